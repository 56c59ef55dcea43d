#include "acmix/c_api.h"

#include <string>

#include "acmix/operators.h"
#include "dispatch.h"

#ifndef ACMIX_VERSION
#define ACMIX_VERSION "development"
#endif
#ifndef ACMIX_ARCHITECTURES
#define ACMIX_ARCHITECTURES ""
#endif

namespace {

using namespace acmix;

std::string quoted(const std::string& text) { return '"' + text + '"'; }

template <class Problem>
std::string describe_entries(const char* op_type) {
    std::string json;
    for (const Entry<Problem>& entry : table<Problem>()) {
        json += json.empty() ? "" : ", ";
        json += "{\"operator\": " + quoted(op_type) + ", \"dtype\": " + quoted(name(entry.dtype)) +
                ", \"layout\": " + quoted(name(entry.layout)) + ", \"head_dim\": " + std::to_string(entry.head_dim) +
                ", \"kernel\": " + quoted(name(entry.kernel)) + ", \"min_sm\": " + std::to_string(entry.min_sm) + "}";
    }
    return json;
}

template <class Problem>
const char* launch_on_device(const Problem* problem, int kernel, const void* first, const void* second, void* y,
                             cudaStream_t stream) {
    static thread_local std::string reason;
    const auto wanted = static_cast<Kernel>(kernel);
    reason = launch(*problem, first, second, y, stream, kernel < 0 ? nullptr : &wanted);
    return reason.empty() ? nullptr : reason.c_str();
}

}  // namespace

extern "C" {

const char* acmix_describe() {
    static const std::string json =
        "{\"version\": " + quoted(ACMIX_VERSION) + ", \"cuda\": " +
        quoted(std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)) +
        ", \"architectures\": " + quoted(ACMIX_ARCHITECTURES) + ", \"entries\": [" +
        describe_entries<LocalAttention>(local_attention::kOpType) + ", " +
        describe_entries<OutlookAttention>(outlook_attention::kOpType) + "]}";
    return json.c_str();
}

const char* acmix_local_attention(const LocalAttention* problem, int kernel, const void* qkv,
                                  const void* position_weight, void* y, cudaStream_t stream) {
    return launch_on_device(problem, kernel, qkv, position_weight, y, stream);
}

const char* acmix_outlook_attention(const OutlookAttention* problem, int kernel, const void* logits, const void* values,
                                    void* y, cudaStream_t stream) {
    return launch_on_device(problem, kernel, logits, values, y, stream);
}
}
