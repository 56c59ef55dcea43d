#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <utility>

#include "acmix/operators.h"
#include "launchers.h"

namespace acmix {
namespace {

// What the kernels are compiled for holds what the definitions allow.
static_assert(*std::prev(std::end(local_attention::kHeadDims)) <= kMaxHeadDim);
static_assert(*std::prev(std::end(outlook_attention::kHeadDims)) <= kMaxHeadDim);

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

template <std::size_t kSizes, std::size_t kSteps, std::size_t kDims>
std::string outside_lists(const Attention& problem, const IntAttribute& kernel_size,
                          const std::int32_t (&kernel_sizes)[kSizes], const IntAttribute& stride,
                          const std::int32_t (&strides)[kSteps], const std::int32_t (&head_dims)[kDims]) {
    std::string reason = outside(kernel_size.name, problem.kernel_size, kernel_sizes);
    if (reason.empty()) reason = outside(stride.name, problem.stride, strides);
    if (reason.empty()) reason = outside("head_dim", problem.head_dim, head_dims);
    return reason;
}

std::string outside_lists(const LocalAttention& problem) {
    using namespace local_attention;
    return outside_lists(problem, kKernelSize, kKernelSizes, kStride, kStrides, kHeadDims);
}

std::string outside_lists(const OutlookAttention& problem) {
    using namespace outlook_attention;
    return outside_lists(problem, kKernelSize, kKernelSizes, kStride, kStrides, kHeadDims);
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
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - 1024;  // a block's threads count past it
    constexpr std::int64_t kMostBlocks = 65535;
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

template <class Problem>
Found<Problem> lookup(const Problem& problem, std::int32_t sm, const Kernel* wanted) {
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

// Why a problem that find() may accept cannot be launched; empty if it can.
template <class Problem>
std::string incomplete(const Problem& problem) {
    const std::int32_t least = std::min({problem.num_heads, problem.head_dim, problem.height, problem.width,
                                         problem.kernel_size, problem.stride, problem.batch < 0 ? 0 : 1});
    if (least < 1)
        return unsupported("a size that is not positive", "a batch of at least 0 and other sizes of at least 1");
    if (!std::isfinite(problem.scale)) return unsupported("scale " + std::to_string(problem.scale), "finite numbers");
    return "";
}

template <class Problem>
std::string run(const Problem& problem, const void* first, const void* second, void* y, cudaStream_t stream,
                const Kernel* wanted) {
    if (std::string reason = incomplete(problem); !reason.empty()) return reason;
    if (problem.batch == 0) return "";
    int device = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) {
        Found<Problem> found = lookup(problem, major * 10 + minor, wanted);
        if (found.entry == nullptr) return std::move(found.reason);
        error = found.entry->launch(problem, first, second, y, stream);
    }
    return error == cudaSuccess ? "" : std::string("CUDA: ") + cudaGetErrorString(error);
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

const char* name(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? "float32" : dtype == Dtype::kFloat16 ? "float16" : "unknown dtype";
}
const char* name(Layout layout) {
    return layout == Layout::kNchw ? "NCHW" : layout == Layout::kNhwc ? "NHWC" : "unknown layout";
}
const char* name(Kernel kernel) {
    return kernel == Kernel::kSimt ? "simt" : kernel == Kernel::kMma ? "mma" : "unknown kernel";
}

Found<LocalAttention> find(const LocalAttention& problem, std::int32_t sm, const Kernel* wanted) {
    return lookup(problem, sm, wanted);
}
Found<OutlookAttention> find(const OutlookAttention& problem, std::int32_t sm, const Kernel* wanted) {
    return lookup(problem, sm, wanted);
}

std::string launch(const LocalAttention& problem, const void* qkv, const void* position_weight, void* y,
                   cudaStream_t stream, const Kernel* wanted) {
    return run(problem, qkv, position_weight, y, stream, wanted);
}
std::string launch(const OutlookAttention& problem, const void* logits, const void* values, void* y,
                   cudaStream_t stream, const Kernel* wanted) {
    return run(problem, logits, values, y, stream, wanted);
}

}  // namespace acmix
