#include "acmix/c_api.h"

#include <string>

#include "acmix/launch.h"

#ifndef ACMIX_VERSION
#define ACMIX_VERSION "development"
#endif
#ifndef ACMIX_ARCHITECTURES
#define ACMIX_ARCHITECTURES ""
#endif
#ifndef ACMIX_SOURCES
#define ACMIX_SOURCES "development"
#endif

namespace acmix {

const char* name(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? "float32" : dtype == Dtype::kFloat16 ? "float16" : "unknown dtype";
}
const char* name(Layout layout) {
    return layout == Layout::kNchw ? "NCHW" : layout == Layout::kNhwc ? "NHWC" : "unknown layout";
}
const char* name(Kernel kernel) {
    return kernel == Kernel::kSimt ? "simt" : kernel == Kernel::kMma ? "mma" : "unknown kernel";
}

const char* sources() { return ACMIX_SOURCES; }

namespace {

std::string quoted(const std::string& text) { return '"' + text + '"'; }

template <class Problem>
void describe_entries(std::string& json) {
    for (const Entry<Problem>& entry : table<Problem>()) {
        json += json.empty() ? "" : ", ";
        json += "{\"operator\": " + quoted(Definition<Problem>::kOpType) + ", \"dtype\": " + quoted(name(entry.dtype)) +
                ", \"layout\": " + quoted(name(entry.layout)) + ", \"head_dim\": " + std::to_string(entry.head_dim) +
                ", \"kernel\": " + quoted(name(entry.kernel)) + ", \"min_sm\": " + std::to_string(entry.min_sm) + "}";
    }
}

template <class... Problems>
std::string describe(List<Problems...>) {
    std::string entries;
    (describe_entries<Problems>(entries), ...);
    return "{\"version\": " + quoted(ACMIX_VERSION) + ", \"sources\": " + quoted(sources()) + ", \"cuda\": " +
           quoted(std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)) +
           ", \"architectures\": " + quoted(ACMIX_ARCHITECTURES) + ", \"entries\": [" + entries + "]}";
}

}  // namespace
}  // namespace acmix

extern "C" const char* acmix_describe() {
    static const std::string json = acmix::describe(acmix::Operators{});
    return json.c_str();
}
