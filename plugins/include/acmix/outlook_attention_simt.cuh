// Outlook attention: unfold, softmax, weighted sum and fold in one pass over the output.
#pragma once

#include <cmath>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

// What the host works out once for all blocks.
template <Dtype kDtype, Layout kLayout>
struct OutlookPlan {
    Strides<Element<kDtype>, kLayout> logits, values;
    Divisor width;
};

// Fold, read from the output's side: a pixel sums what the windows that cover it have for it. No atomics, and the K^2
// logits of a (window, place) are read twice, for the maximum and for the weights. One block per run of pixels, head
// and image.
//
// `make instructions` counts by the headings Prologue, Rows and Epilogue.
template <Dtype kDtype, Layout kLayout, int kHeadDim, int kKernelSize>
__global__ void outlook_attention_simt_kernel(OutlookAttention problem, OutlookPlan<kDtype, kLayout> plan,
                                              const Element<kDtype>* __restrict__ logits,
                                              const Element<kDtype>* __restrict__ values,
                                              Element<kDtype>* __restrict__ y) {
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    constexpr int kMargin = kKernelSize / 2, kPlaces = kKernelSize * kKernelSize;

    // Prologue: the pixel.
    const int height = problem.height, width = problem.width;
    const int shift = problem.stride - 1;  // strides are 1 and 2: what is left of a division, and the division
    const Group group;
    const int pixel = static_cast<int>(blockIdx.x) * Group::kPixelsPerBlock + group.pixel;
    if (pixel >= height * width || group.channel >= problem.head_dim) return;
    const int pixel_y = plan.width.quotient(pixel), pixel_x = pixel - pixel_y * width;
    const int head = static_cast<int>(blockIdx.y), channel = head * problem.head_dim + group.channel;
    const T* const image = plan.values.at(values + blockIdx.z * plan.values.image, channel, 0);
    const T* const scores = plan.logits.at(logits + blockIdx.z * plan.logits.image, head * kPlaces * kPlaces, 0);

    // Rows: of windows in which the pixel lies, and of each window's own.
    const float scale = problem.scale * kLog2E;
    float folded[kVector] = {};
#pragma unroll 1
    for (int to_y = 0; to_y < kKernelSize; ++to_y) {
        const int center_y = pixel_y + kMargin - to_y;
        if (center_y < 0 || (center_y & shift) != 0 || center_y >= height) continue;
#pragma unroll 1
        for (int to_x = 0; to_x < kKernelSize; ++to_x) {
            const int center_x = pixel_x + kMargin - to_x;
            if (center_x < 0 || (center_x & shift) != 0 || center_x >= width) continue;
            const T* const window = plan.logits.below(
                plan.logits.at(scores, (to_y * kKernelSize + to_x) * kPlaces, center_x >> shift), center_y >> shift);
            float maximum = -INFINITY;
#pragma unroll
            for (int from = 0; from < kPlaces; ++from) {
                maximum = fmaxf(maximum, scale * to_float(*plan.logits.at(window, from, 0)));
            }
            float sum = 0, attended[kVector] = {};
#pragma unroll 1
            for (int from_y = 0; from_y < kKernelSize; ++from_y) {
                const int value_y = center_y + from_y - kMargin;
                const bool row_inside = value_y >= 0 && value_y < height;
                const T* const row = plan.values.below(image, row_inside ? value_y : 0);
#pragma unroll
                for (int from_x = 0; from_x < kKernelSize; ++from_x) {
                    const int value_x = center_x + from_x - kMargin;
                    const float weight = ptx::exp2(
                        scale * to_float(*plan.logits.at(window, from_y * kKernelSize + from_x, 0)) - maximum);
                    sum += weight;
                    if (!row_inside || value_x < 0 || value_x >= width) continue;
                    float value[kVector];
                    load(value, plan.values.at(row, 0, value_x), plan.values);
#pragma unroll
                    for (int i = 0; i < kVector; ++i) attended[i] += weight * value[i];
                }
            }
            const float factor = 1 / sum;
#pragma unroll
            for (int i = 0; i < kVector; ++i) folded[i] += attended[i] * factor;
        }
    }

    // Epilogue
    save(plan.values.below(plan.values.at(y + blockIdx.z * plan.values.image, channel, pixel_x), pixel_y), folded,
         plan.values);
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t outlook_attention_simt(const OutlookAttention& problem, const void* const* inputs, void* y,
                                   cudaStream_t stream) {
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    const void *const logits = inputs[0], *const values = inputs[1];
    if (kLayout == Layout::kNhwc && !(aligned(values, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    const int runs = ceil_div(problem.height * problem.width, Group::kPixelsPerBlock);
    return with_constant<3, 5, 7>(problem.kernel_size, [&](auto kernel_size) {
        const int weights = problem.num_heads * kernel_size * kernel_size * kernel_size * kernel_size;
        const int logit_channels = kLayout == Layout::kNhwc ? ceil_div(weights, 8) * 8 : weights;
        const OutlookPlan<kDtype, kLayout> plan{
            {logit_channels, ceil_div(problem.height, problem.stride), ceil_div(problem.width, problem.stride)},
            {problem.num_heads * problem.head_dim, problem.height, problem.width},
            Divisor(problem.width)};
        return ptx::launch(outlook_attention_simt_kernel<kDtype, kLayout, kHeadDim, kernel_size>,
                           dim3(runs, problem.num_heads, problem.batch), dim3(Group::kThreads), 0, stream, problem,
                           plan, static_cast<const T*>(logits), static_cast<const T*>(values), static_cast<T*>(y));
    });
}

}  // namespace acmix
