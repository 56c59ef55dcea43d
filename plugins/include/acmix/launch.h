// What a framework binding needs of the kernels: problems, the dispatch table, one lookup in it and one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <string>

namespace acmix {

enum class Dtype : std::int32_t { kFloat32 = 0, kFloat16 = 1 };
// TensorRT's LINEAR and HWC8: in NHWC a pixel's channels are padded to a multiple of 8.
enum class Layout : std::int32_t { kNchw = 0, kNhwc = 1 };
enum class Kernel : std::int32_t { kSimt = 0, kMma = 1 };  // scalar arithmetic, tensor cores

// What is asked of a kernel. Tensors have `dtype` and, where four-dimensional, `layout`. They hold finite numbers: what
// is not finite may spoil outputs up to 8 pixels beyond the windows that see it.
struct Attention {
    Dtype dtype;
    Layout layout;
    std::int32_t batch;
    std::int32_t num_heads;
    std::int32_t head_dim;
    std::int32_t height;
    std::int32_t width;
    std::int32_t kernel_size;
    std::int32_t stride;
    float scale;
};

// y = softmax(scale * q.(k - P l)) v over the reflected kernel_size x kernel_size neighbourhood, qkv = [q | k | v]:
//   inputs  qkv             [batch, 3 * num_heads * head_dim, height, width]
//           position_weight [head_dim, 2], P; null for none
//   output  y               [batch, num_heads * head_dim, height / stride, width / stride]
struct LocalAttention : Attention {};

// y = fold(softmax(scale * logits) unfold(values)) with zero padding kernel_size / 2, as in VOLO's outlooker; a window
// stands at every stride-th pixel, h = ceil(height / stride), w = ceil(width / stride). With K = kernel_size:
//   inputs  logits          [batch, num_heads * K^4, h, w], channel (head * K^2 + to) * K^2 + from
//           values          [batch, num_heads * head_dim, height, width]
//   output  y               [batch, num_heads * head_dim, height, width]
struct OutlookAttention : Attention {};

// One row of a dispatch table. `head_dim` is the padded one: a problem takes the smallest row that holds it.
template <class Problem>
struct Entry {
    Dtype dtype;
    Layout layout;
    std::int32_t head_dim;
    Kernel kernel;
    std::int32_t min_sm;  // 75 for sm_75
    cudaError_t (*launch)(const Problem&, const void* first, const void* second, void* y, cudaStream_t);
};

template <class Problem>
struct Found {
    const Entry<Problem>* entry;  // null: unsupported
    std::string reason;           // "unsupported: got ..., supported ..." where entry is null
};

inline constexpr std::int32_t kAnySm = std::numeric_limits<std::int32_t>::max();

// The first entry for a problem on a device of compute capability `sm`, tensor cores before scalar arithmetic, and of
// `wanted` alone where it is given. Calls nothing of CUDA, so that it serves format negotiation on a machine without a
// GPU too. Sizes below 1 mean "not known yet" and are not checked. Allocates nothing where it finds an entry.
Found<LocalAttention> find(const LocalAttention&, std::int32_t sm = kAnySm, const Kernel* wanted = nullptr);
Found<OutlookAttention> find(const OutlookAttention&, std::int32_t sm = kAnySm, const Kernel* wanted = nullptr);

// Runs a problem on the current device, on the stream alone. Returns an empty string when the launch was accepted, also
// for a batch of 0, else one sentence; allocates nothing when it was.
std::string launch(const LocalAttention&, const void* qkv, const void* position_weight, void* y, cudaStream_t,
                   const Kernel* wanted = nullptr);
std::string launch(const OutlookAttention&, const void* logits, const void* values, void* y, cudaStream_t,
                   const Kernel* wanted = nullptr);

}  // namespace acmix
