#include "dispatch.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "acmix/operators.h"
#include "launchers.h"

namespace acmix {
namespace {

#define LOCAL_MMA(kHeadDim, kDtype, kLayout) \
    {Dtype::kDtype,                          \
     Layout::kLayout,                        \
     kHeadDim,                               \
     Kernel::kMma,                           \
     75,                                     \
     local_attention_mma<Dtype::kDtype, Layout::kLayout, kHeadDim>},
#define LOCAL_SIMT(kHeadDim, kDtype, kLayout) \
    {Dtype::kDtype,                           \
     Layout::kLayout,                         \
     kHeadDim,                                \
     Kernel::kSimt,                           \
     0,                                       \
     local_attention_simt<Dtype::kDtype, Layout::kLayout, kHeadDim>},
#define OUTLOOK_SIMT(kHeadDim, kDtype, kLayout) \
    {Dtype::kDtype,                             \
     Layout::kLayout,                           \
     kHeadDim,                                  \
     Kernel::kSimt,                             \
     0,                                         \
     outlook_attention_simt<Dtype::kDtype, Layout::kLayout, kHeadDim>},

constexpr Entry<LocalAttention> kLocalAttention[] = {
    ACMIX_FOR_HEAD_DIMS(LOCAL_MMA, kFloat16, kNchw) ACMIX_FOR_HEAD_DIMS(LOCAL_MMA, kFloat16, kNhwc)
        ACMIX_FOR_HEAD_DIMS(LOCAL_SIMT, kFloat32, kNchw) ACMIX_FOR_HEAD_DIMS(LOCAL_SIMT, kFloat16, kNchw)
            ACMIX_FOR_HEAD_DIMS(LOCAL_SIMT, kFloat16, kNhwc)};

constexpr Entry<OutlookAttention> kOutlookAttention[] = {ACMIX_FOR_HEAD_DIMS(OUTLOOK_SIMT, kFloat32, kNchw)
                                                             ACMIX_FOR_HEAD_DIMS(OUTLOOK_SIMT, kFloat16, kNchw)
                                                                 ACMIX_FOR_HEAD_DIMS(OUTLOOK_SIMT, kFloat16, kNhwc)};

std::string unsupported(const std::string& got, const std::string& supported) {
    return "unsupported: got " + got + ", supported " + supported;
}

// Empty if `value` is in the list or not known yet.
template <std::size_t kCount>
std::string outside(const char* what, std::int32_t value, const std::int32_t (&supported)[kCount]) {
    if (value < 1 || std::find(std::begin(supported), std::end(supported), value) != std::end(supported)) return "";
    std::string list;
    for (const std::int32_t one : supported) list += (list.empty() ? "" : ", ") + std::to_string(one);
    return unsupported(std::string(what) + " " + std::to_string(value), list);
}

std::string outside_lists(const LocalAttention& problem) {
    using namespace local_attention;
    std::string reason = outside(kKernelSize.name, problem.kernel_size, kKernelSizes);
    if (reason.empty()) reason = outside(kStride.name, problem.stride, kStrides);
    if (reason.empty()) reason = outside("head_dim", problem.head_dim, kHeadDims);
    return reason;
}

std::string outside_lists(const OutlookAttention& problem) {
    using namespace outlook_attention;
    std::string reason = outside(kKernelSize.name, problem.kernel_size, kKernelSizes);
    if (reason.empty()) reason = outside(kStride.name, problem.stride, kStrides);
    if (reason.empty()) reason = outside("head_dim", problem.head_dim, kHeadDims);
    return reason;
}

// What the map's size must be beside positive; empty if it fits.
std::string outside_geometry(const LocalAttention& problem) {
    const auto refused = [&](const std::string& supported) {
        return unsupported("a " + std::to_string(problem.height) + "x" + std::to_string(problem.width) + " map",
                           supported);
    };
    if (problem.stride > 0 && (problem.height % problem.stride != 0 || problem.width % problem.stride != 0)) {
        return refused("multiples of stride " + std::to_string(problem.stride));
    }
    const std::int32_t margin = problem.kernel_size / 2;
    if (problem.kernel_size > 0 && (problem.height <= margin || problem.width <= margin)) {
        return refused("more than " + std::to_string(margin) + " pixels each way for kernel_size " +
                       std::to_string(problem.kernel_size));
    }
    return "";
}

std::string outside_geometry(const OutlookAttention&) { return ""; }

// Kernels count the pixels of a map and the elements of an NHWC row in int32, and rows, heads and images along axes of
// the launch grid.
template <class Problem>
std::string too_large(const Problem& problem) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max(), kMostBlocks = 65535;
    const auto beyond = [](const char* what, std::int64_t value, std::int64_t most) {
        return value <= most ? ""
                             : unsupported(what + (" " + std::to_string(value)), "at most " + std::to_string(most));
    };
    std::string reason = beyond("batch", problem.batch, kMostBlocks);
    if (reason.empty()) reason = beyond("height", problem.height, kMostBlocks);
    if (reason.empty()) reason = beyond("num_heads", problem.num_heads, kMostBlocks);
    const auto width = static_cast<std::int64_t>(problem.width);
    if (reason.empty()) reason = beyond("height * width", width * problem.height, kMost);
    const std::int64_t row = 3 * width * problem.num_heads * std::max(problem.head_dim, 1);
    if (reason.empty()) reason = beyond("3 * num_heads * head_dim * width", row, kMost);
    return reason;
}

// Allocates nothing where it finds an entry, as it is asked before every launch.
template <class Problem>
Found<Problem> lookup(const Problem& problem, const Kernel* wanted, std::int32_t sm) {
    std::string reason = outside_lists(problem);
    if (reason.empty() && problem.height > 0 && problem.width > 0) {
        reason = outside_geometry(problem);
        if (reason.empty() && problem.num_heads > 0 && problem.batch > 0) reason = too_large(problem);
    }
    if (!reason.empty()) return {nullptr, reason};

    for (const Entry<Problem>& entry : table<Problem>()) {
        if (entry.dtype == problem.dtype && entry.layout == problem.layout && entry.head_dim >= problem.head_dim &&
            (wanted == nullptr || entry.kernel == *wanted) && entry.min_sm <= sm) {
            return {&entry, ""};
        }
    }
    std::string rows;
    for (const Entry<Problem>& entry : table<Problem>()) {
        const std::string row = std::string(name(entry.dtype)) + " " + name(entry.layout) + " " + name(entry.kernel) +
                                (entry.min_sm > 0 ? " from sm_" + std::to_string(entry.min_sm) : "");
        if (rows.find(row) == std::string::npos) rows += (rows.empty() ? "" : ", ") + row;
    }
    return {nullptr, unsupported(std::string(name(problem.dtype)) + " " + name(problem.layout) +
                                     (wanted == nullptr ? "" : std::string(" ") + name(*wanted)) +
                                     (sm == kAnySm ? "" : " on sm_" + std::to_string(sm)),
                                 rows)};
}

}  // namespace

template <>
Table<LocalAttention> table() {
    return {kLocalAttention, std::size(kLocalAttention)};
}

template <>
Table<OutlookAttention> table() {
    return {kOutlookAttention, std::size(kOutlookAttention)};
}

const char* name(Dtype dtype) { return dtype == Dtype::kFloat32 ? "float32" : "float16"; }
const char* name(Layout layout) { return layout == Layout::kNchw ? "NCHW" : "NHWC"; }
const char* name(Kernel kernel) { return kernel == Kernel::kSimt ? "simt" : "mma"; }

Found<LocalAttention> find(const LocalAttention& problem, std::int32_t sm) { return lookup(problem, nullptr, sm); }
Found<OutlookAttention> find(const OutlookAttention& problem, std::int32_t sm) { return lookup(problem, nullptr, sm); }
Found<LocalAttention> find(const LocalAttention& problem, Kernel kernel, std::int32_t sm) {
    return lookup(problem, &kernel, sm);
}
Found<OutlookAttention> find(const OutlookAttention& problem, Kernel kernel, std::int32_t sm) {
    return lookup(problem, &kernel, sm);
}

}  // namespace acmix
