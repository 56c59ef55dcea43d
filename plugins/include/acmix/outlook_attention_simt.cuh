// Outlook attention: unfold, softmax, weighted sum and fold in one pass over the output.
#pragma once

#include <cmath>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

// Fold, read from the output's side: a pixel sums what the windows that cover it have for it. No atomics, and the K^2
// logits of a (window, place) are read twice, for the maximum and for the weights. One block per run of pixels, head
// and image.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
__global__ void outlook_attention_kernel(OutlookAttention problem, const Element<kDtype>* __restrict__ logits,
                                         const Element<kDtype>* __restrict__ values, Element<kDtype>* __restrict__ y) {
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    const int height = problem.height, width = problem.width, stride = problem.stride;
    const int kernel_size = problem.kernel_size, margin = kernel_size / 2, places = kernel_size * kernel_size;
    const int rows = ceil_div(height, stride), columns = ceil_div(width, stride);  // of windows
    const int run = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
    const auto image = static_cast<std::int64_t>(blockIdx.z);

    const Group group;
    const int pixel = run * Group::kPixelsPerBlock + group.pixel;
    if (pixel >= height * width || group.channel >= problem.head_dim) return;
    const int pixel_y = pixel / width, pixel_x = pixel % width;

    const std::int64_t pixels = static_cast<std::int64_t>(height) * width;
    const std::int64_t windows = static_cast<std::int64_t>(rows) * columns;
    const std::int64_t channels = static_cast<std::int64_t>(problem.num_heads) * problem.head_dim;
    const std::int64_t weights = static_cast<std::int64_t>(problem.num_heads) * places * places;
    const std::int64_t logit_channels = kLayout == Layout::kNhwc ? (weights + 7) / 8 * 8 : weights;
    const Image<const T, kLayout> input{values + image * channels * pixels, channels, pixels};
    const Image<const T, kLayout> scores{logits + image * logit_channels * windows, logit_channels, windows};
    const Image<T, kLayout> output{y + image * channels * pixels, channels, pixels};
    const std::int64_t channel = static_cast<std::int64_t>(head) * problem.head_dim + group.channel;

    const float scale = problem.scale * kLog2E;
    float folded[kVector] = {};
    for (int to = 0; to < places; ++to) {
        // The window in which this pixel is place `to`.
        const int center_y = pixel_y + margin - to / kernel_size, center_x = pixel_x + margin - to % kernel_size;
        if (center_y < 0 || center_x < 0 || center_y % stride != 0 || center_x % stride != 0) continue;
        if (center_y / stride >= rows || center_x / stride >= columns) continue;
        const std::int64_t window = static_cast<std::int64_t>(center_y / stride) * columns + center_x / stride;
        const std::int64_t first = (static_cast<std::int64_t>(head) * places + to) * places;

        float maximum = -INFINITY;
        for (int from = 0; from < places; ++from) {
            maximum = fmaxf(maximum, scale * to_float(*scores.at(first + from, window)));
        }
        float sum = 0, attended[kVector] = {};
        for (int from = 0; from < places; ++from) {
            const float weight = ptx::exp2(scale * to_float(*scores.at(first + from, window)) - maximum);
            sum += weight;
            const int value_y = center_y + from / kernel_size - margin,
                      value_x = center_x + from % kernel_size - margin;
            if (value_y < 0 || value_x < 0 || value_y >= height || value_x >= width) continue;
            float value[kVector];
            input.load(value, channel, static_cast<std::int64_t>(value_y) * width + value_x);
#pragma unroll
            for (int i = 0; i < kVector; ++i) attended[i] += weight * value[i];
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) folded[i] += attended[i] / sum;
    }
    output.save(folded, channel, pixel);
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
    return ptx::launch(outlook_attention_kernel<kDtype, kLayout, kHeadDim>,
                       dim3(runs, problem.num_heads, problem.batch), dim3(Group::kThreads), 0, stream, problem,
                       static_cast<const T*>(logits), static_cast<const T*>(values), static_cast<T*>(y));
}

}  // namespace acmix
