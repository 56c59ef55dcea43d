// The operators' definitions in double, one thread per element of the output: what the kernels are compared with. It
// shares nothing with them but the problem's description.
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "acmix/c_api.h"
#include "acmix/ptx.cuh"

namespace {

using namespace acmix;
using Index = std::int64_t;

// Tensor [batch, channels, height, width] of a problem's dtype, in its layout.
struct Tensor {
    Dtype dtype;
    Layout layout;
    const void* data;
    Index channels, height, width;

    __device__ double operator()(Index image, Index channel, Index y, Index x) const {
        const Index at = layout == Layout::kNchw
                             ? ((image * channels + channel) * height + y) * width + x
                             : ((image * height + y) * width + x) * ((channels + 7) / 8 * 8) + channel;
        if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[at];
        return __half2float(static_cast<const __half*>(data)[at]);
    }
};

// An element of the output, NCHW, and whether there is one for this thread.
struct Output {
    Index at, image, channel, y, x;
    bool exists;

    __device__ Output(Index batch, Index channels, Index height, Index width) {
        at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
        x = at % width;
        y = at / width % height;
        channel = at / width / height % channels;
        image = at / width / height / channels;
        exists = image < batch;
    }
};

__device__ Index reflected(Index i, Index size) {
    if (i < 0) return -i;
    if (i >= size) return 2 * (size - 1) - i;
    return i;
}

__device__ double coordinate(Index i, Index size) { return -1 + 2 * static_cast<double>(i) / (size - 1); }

__global__ void local_attention(LocalAttention p, const void* qkv_data, const void* position_weight, double* y) {
    const Index channels = static_cast<Index>(p.num_heads) * p.head_dim, size = p.kernel_size;
    const Output out(p.batch, channels, p.height / p.stride, p.width / p.stride);
    if (!out.exists) return;
    const Tensor qkv{p.dtype, p.layout, qkv_data, 3 * channels, p.height, p.width};
    const Tensor position{p.dtype, Layout::kNchw, position_weight, 1, p.head_dim, 2};
    const Index head = out.channel / p.head_dim * p.head_dim;
    const auto key_y = [&](Index n) { return reflected(out.y * p.stride + n / size - size / 2, p.height); };
    const auto key_x = [&](Index n) { return reflected(out.x * p.stride + n % size - size / 2, p.width); };
    const auto logit = [&](Index n) {
        double sum = 0;
        for (Index i = 0; i < p.head_dim; ++i) {
            double key = qkv(out.image, channels + head + i, key_y(n), key_x(n));
            if (position_weight != nullptr) {
                key -= position(0, 0, i, 0) * coordinate(key_x(n), p.width);
                key -= position(0, 0, i, 1) * coordinate(key_y(n), p.height);
            }
            sum += qkv(out.image, head + i, out.y * p.stride, out.x * p.stride) * key;
        }
        return p.scale * sum;
    };
    double maximum = -INFINITY;
    for (Index n = 0; n < size * size; ++n) maximum = fmax(maximum, logit(n));
    double sum = 0, attended = 0;
    for (Index n = 0; n < size * size; ++n) {
        const double weight = exp(logit(n) - maximum);
        sum += weight;
        attended += weight * qkv(out.image, 2 * channels + out.channel, key_y(n), key_x(n));
    }
    y[out.at] = attended / sum;
}

__global__ void outlook_attention(OutlookAttention p, const void* logits_data, const void* values_data, double* y) {
    const Index channels = static_cast<Index>(p.num_heads) * p.head_dim, size = p.kernel_size, places = size * size;
    const Output out(p.batch, channels, p.height, p.width);
    if (!out.exists) return;
    const Index rows = (p.height + p.stride - 1) / p.stride, columns = (p.width + p.stride - 1) / p.stride;
    const Tensor logits{p.dtype, p.layout, logits_data, p.num_heads * places * places, rows, columns};
    const Tensor values{p.dtype, p.layout, values_data, channels, p.height, p.width};
    double folded = 0;
    for (Index row = 0; row < rows; ++row) {
        for (Index column = 0; column < columns; ++column) {
            const Index top = row * p.stride - size / 2, left = column * p.stride - size / 2;
            if (out.y < top || out.y >= top + size || out.x < left || out.x >= left + size) continue;
            const Index to = (out.y - top) * size + out.x - left;
            const auto logit = [&](Index from) {
                const Index channel = (out.channel / p.head_dim * places + to) * places + from;
                return p.scale * logits(out.image, channel, row, column);
            };
            double maximum = -INFINITY;
            for (Index from = 0; from < places; ++from) maximum = fmax(maximum, logit(from));
            double sum = 0, attended = 0;
            for (Index from = 0; from < places; ++from) {
                const double weight = exp(logit(from) - maximum);
                sum += weight;
                const Index from_y = top + from / size, from_x = left + from % size;
                if (from_y < 0 || from_y >= p.height || from_x < 0 || from_x >= p.width) continue;
                attended += weight * values(out.image, out.channel, from_y, from_x);
            }
            folded += attended / sum;
        }
    }
    y[out.at] = folded;
}

template <class Problem>
const char* launch(void (*kernel)(Problem, const void*, const void*, double*), const Problem& problem, Index elements,
                   const void* first, const void* second, double* y, cudaStream_t stream) {
    constexpr int kThreads = 256;
    const dim3 blocks(static_cast<unsigned>((elements + kThreads - 1) / kThreads));
    const cudaError_t error = ptx::launch(kernel, blocks, dim3(kThreads), 0, stream, problem, first, second, y);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

extern "C" {

// As acmix_local_attention, but y is double and NCHW.
ACMIX_EXPORT const char* reference_local_attention(const LocalAttention* p, const void* qkv,
                                                   const void* position_weight, double* y, cudaStream_t stream) {
    const Index pixels = static_cast<Index>(p->height / p->stride) * (p->width / p->stride);
    return launch(local_attention, *p, pixels * p->batch * p->num_heads * p->head_dim, qkv, position_weight, y, stream);
}

// As acmix_outlook_attention, but y is double and NCHW.
ACMIX_EXPORT const char* reference_outlook_attention(const OutlookAttention* p, const void* logits, const void* values,
                                                     double* y, cudaStream_t stream) {
    const Index pixels = static_cast<Index>(p->height) * p->width;
    return launch(outlook_attention, *p, pixels * p->batch * p->num_heads * p->head_dim, logits, values, y, stream);
}
}
