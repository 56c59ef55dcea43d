// Local attention in scalar arithmetic: reads straight from global memory and leaves the reuse to L1.
#pragma once

#include <cmath>
#include <iterator>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

inline constexpr int kMaxKernelSize = *std::prev(std::end(Definition<LocalAttention>::kKernelSizes));

// A window is read row by row, and a row's logits share one rescaling of what was summed before (online softmax, arXiv
// 1805.02867; in powers of two). One block per run of pixels, head and image.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
__global__ void local_attention_simt_kernel(LocalAttention problem, const Element<kDtype>* __restrict__ qkv,
                                            const Element<kDtype>* __restrict__ position_weight,
                                            Element<kDtype>* __restrict__ y) {
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    const int height = problem.height, width = problem.width, stride = problem.stride;
    const int out_height = height / stride, out_width = width / stride;
    const int run = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
    const auto image = static_cast<std::int64_t>(blockIdx.z);

    const Group group;
    const int out_pixel = run * Group::kPixelsPerBlock + group.pixel;
    const bool inside = out_pixel < out_height * out_width;
    const int out_y = inside ? out_pixel / out_width : 0, out_x = inside ? out_pixel % out_width : 0;
    const bool padding = group.channel >= problem.head_dim;

    const std::int64_t channels = static_cast<std::int64_t>(problem.num_heads) * problem.head_dim;
    const std::int64_t pixels = static_cast<std::int64_t>(height) * width;
    const Image<const T, kLayout> input{qkv + image * 3 * channels * pixels, 3 * channels, pixels};
    const std::int64_t query_channel = static_cast<std::int64_t>(head) * problem.head_dim + group.channel;
    const std::int64_t key_channel = query_channel + channels, value_channel = key_channel + channels;

    float query[kVector] = {};
    if (!padding) input.load(query, query_channel, static_cast<std::int64_t>(out_y) * stride * width + out_x * stride);

    float along_x = 0, along_y = 0;  // q.P
    if (position_weight != nullptr && !padding) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            along_x += query[i] * to_float(position_weight[(group.channel + i) * 2]);
            along_y += query[i] * to_float(position_weight[(group.channel + i) * 2 + 1]);
        }
    }
    along_x = Group::sum(along_x);
    along_y = Group::sum(along_y);

    const Coordinate coordinate_x(width), coordinate_y(height);
    const int kernel_size = problem.kernel_size, margin = kernel_size / 2;
    const float scale = problem.scale * kLog2E;
    float maximum = -INFINITY, sum = 0, attended[kVector] = {};
    for (int dy = 0; dy < kernel_size; ++dy) {
        const int key_y = reflect(out_y * stride + dy - margin, height);
        const std::int64_t row = static_cast<std::int64_t>(key_y) * width;
        const float row_term = along_y * coordinate_y(key_y);
        float logits[kMaxKernelSize];
        float row_maximum = -INFINITY;
#pragma unroll
        for (int dx = 0; dx < kMaxKernelSize; ++dx) {
            if (dx < kernel_size) {
                const int key_x = reflect(out_x * stride + dx - margin, width);
                float product = 0;
                if (!padding) {
                    float key[kVector];
                    input.load(key, key_channel, row + key_x);
#pragma unroll
                    for (int i = 0; i < kVector; ++i) product += query[i] * key[i];
                }
                logits[dx] = scale * (Group::sum(product) - along_x * coordinate_x(key_x) - row_term);
                row_maximum = fmaxf(row_maximum, logits[dx]);
            }
        }
        const float raised = fmaxf(maximum, row_maximum);
        const float rescale = ptx::exp2(maximum - raised);
        maximum = raised;
        sum *= rescale;
#pragma unroll
        for (int i = 0; i < kVector; ++i) attended[i] *= rescale;
#pragma unroll
        for (int dx = 0; dx < kMaxKernelSize; ++dx) {
            if (dx < kernel_size) {
                const float weight = ptx::exp2(logits[dx] - maximum);
                sum += weight;
                if (!padding) {
                    const int key_x = reflect(out_x * stride + dx - margin, width);
                    float value[kVector];
                    input.load(value, value_channel, row + key_x);
#pragma unroll
                    for (int i = 0; i < kVector; ++i) attended[i] += weight * value[i];
                }
            }
        }
    }

    if (inside && !padding) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) attended[i] /= sum;
        const std::int64_t out_pixels = static_cast<std::int64_t>(out_height) * out_width;
        const Image<T, kLayout> output{y + image * channels * out_pixels, channels, out_pixels};
        output.save(attended, query_channel, out_pixel);
    }
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t local_attention_simt(const LocalAttention& problem, const void* const* inputs, void* y,
                                 cudaStream_t stream) {
    const void *const qkv = inputs[0], *const position_weight = inputs[1];  // the latter null for none
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    if (kLayout == Layout::kNhwc && !(aligned(qkv, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    const int out_pixels = problem.height / problem.stride * (problem.width / problem.stride);
    const int runs = ceil_div(out_pixels, Group::kPixelsPerBlock);
    return ptx::launch(local_attention_simt_kernel<kDtype, kLayout, kHeadDim>,
                       dim3(runs, problem.num_heads, problem.batch), dim3(Group::kThreads), 0, stream, problem,
                       static_cast<const T*>(qkv), static_cast<const T*>(position_weight), static_cast<T*>(y));
}

}  // namespace acmix
