// Local attention in scalar arithmetic: reads straight from global memory and leaves the reuse to L1.
#pragma once

#include <cmath>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

// What the host works out once for all blocks.
template <Dtype kDtype, Layout kLayout>
struct SimtPlan {
    Strides<Element<kDtype>, kLayout> qkv, y;
    Divisor out_width;
    Coordinate along_x, along_y;
};

// A window is read row by row, and a row's logits share one rescaling of what was summed before (online softmax, arXiv
// 1805.02867; in powers of two). One block per run of pixels, head and image.
//
// `make instructions` counts by the headings Prologue, Rows and Epilogue.
template <Dtype kDtype, Layout kLayout, int kHeadDim, int kKernelSize>
__global__ void local_attention_simt_kernel(LocalAttention problem, SimtPlan<kDtype, kLayout> plan,
                                            const Element<kDtype>* __restrict__ qkv,
                                            const Element<kDtype>* __restrict__ position_weight,
                                            Element<kDtype>* __restrict__ y) {
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;

    // Prologue: the pixel, its query, and q.P. Lanes of channels that only fill up the last take part with zeros.
    const int stride = problem.stride, out_width = problem.width / stride, out_height = problem.height / stride;
    const Group group;
    const int out_pixel = static_cast<int>(blockIdx.x) * Group::kPixelsPerBlock + group.pixel;
    const bool inside = out_pixel < out_height * out_width, padding = group.channel >= problem.head_dim;
    const int out_y = inside ? plan.out_width.quotient(out_pixel) : 0;
    const int out_x = inside ? out_pixel - out_y * out_width : 0;
    const int channels = problem.num_heads * problem.head_dim;
    const int head_channel = padding ? 0 : group.channel;
    const int channel = static_cast<int>(blockIdx.y) * problem.head_dim + head_channel;
    const T* const image = qkv + blockIdx.z * plan.qkv.image;

    float query[kVector];
    load(query, plan.qkv.below(plan.qkv.at(image, channel, out_x * stride), out_y * stride), plan.qkv);
#pragma unroll
    for (int i = 0; i < kVector; ++i) query[i] = padding ? 0 : query[i];
    float along_x = 0, along_y = 0;
    if (position_weight != nullptr) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            along_x += query[i] * to_float(position_weight[(head_channel + i) * 2]);
            along_y += query[i] * to_float(position_weight[(head_channel + i) * 2 + 1]);
        }
    }
    along_x = Group::sum(along_x);
    along_y = Group::sum(along_y);

    // Rows: what the columns have in common in all of them, then logits and weighted sums.
    const float scale = problem.scale * kLog2E;
    int column[kKernelSize];
    float column_term[kKernelSize];
#pragma unroll
    for (int dx = 0; dx < kKernelSize; ++dx) {
        const int key_x = reflect(out_x * stride + dx - kKernelSize / 2, problem.width);
        column[dx] = key_x * plan.qkv.column;
        column_term[dx] = along_x * plan.along_x(key_x);
    }
    float maximum = -INFINITY, sum = 0, attended[kVector] = {};
    const T* const keys = plan.qkv.at(image, channels + channel, 0);
#pragma unroll 1
    for (int dy = 0; dy < kKernelSize; ++dy) {
        const int key_y = reflect(out_y * stride + dy - kKernelSize / 2, problem.height);
        const T* const row_keys = plan.qkv.below(keys, key_y);
        const T* const row_values = plan.qkv.at(row_keys, channels, 0);
        const float row_term = along_y * plan.along_y(key_y);
        float logits[kKernelSize], raised = maximum;
#pragma unroll
        for (int dx = 0; dx < kKernelSize; ++dx) {
            float key[kVector], product = 0;
            load(key, row_keys + column[dx], plan.qkv);
#pragma unroll
            for (int i = 0; i < kVector; ++i) product += query[i] * key[i];
            logits[dx] = scale * (Group::sum(product) - column_term[dx] - row_term);
            raised = fmaxf(raised, logits[dx]);
        }
        const float rescale = ptx::exp2(maximum - raised);
        maximum = raised;
        sum *= rescale;
#pragma unroll
        for (int i = 0; i < kVector; ++i) attended[i] *= rescale;
#pragma unroll
        for (int dx = 0; dx < kKernelSize; ++dx) {
            const float weight = ptx::exp2(logits[dx] - maximum);
            sum += weight;
            float value[kVector];
            load(value, row_values + column[dx], plan.qkv);
#pragma unroll
            for (int i = 0; i < kVector; ++i) attended[i] += weight * value[i];
        }
    }

    // Epilogue
    if (!inside || padding) return;
    const float factor = 1 / sum;
#pragma unroll
    for (int i = 0; i < kVector; ++i) attended[i] *= factor;
    save(plan.y.below(plan.y.at(y + blockIdx.z * plan.y.image, channel, out_x), out_y), attended, plan.y);
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t local_attention_simt(const LocalAttention& problem, const void* const* inputs, void* y,
                                 cudaStream_t stream) {
    const void *const qkv = inputs[0], *const position_weight = inputs[1];  // the latter null for none
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    if (kLayout == Layout::kNhwc && !(aligned(qkv, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    const int out_height = problem.height / problem.stride, out_width = problem.width / problem.stride;
    const int channels = problem.num_heads * problem.head_dim;
    const SimtPlan<kDtype, kLayout> plan{{3 * channels, problem.height, problem.width},
                                         {channels, out_height, out_width},
                                         Divisor(out_width),
                                         Coordinate(problem.width),
                                         Coordinate(problem.height)};
    const int runs = ceil_div(out_height * out_width, Group::kPixelsPerBlock);
    return with_constant<3, 5, 7, 9>(problem.kernel_size, [&](auto kernel_size) {
        return ptx::launch(local_attention_simt_kernel<kDtype, kLayout, kHeadDim, kernel_size>,
                           dim3(runs, problem.num_heads, problem.batch), dim3(Group::kThreads), 0, stream, problem,
                           plan, static_cast<const T*>(qkv), static_cast<const T*>(position_weight),
                           static_cast<T*>(y));
    });
}

}  // namespace acmix
