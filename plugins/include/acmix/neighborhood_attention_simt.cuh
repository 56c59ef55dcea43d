// Neighborhood attention in scalar arithmetic: reads straight from global memory and leaves the reuse to L1.
#pragma once

#include <cfloat>
#include <cmath>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

// What the host works out once for all blocks.
template <Dtype kDtype, Layout kLayout>
struct NeighborhoodPlan {
    Strides<Element<kDtype>, kLayout> qkv, y;
    Divisor width, dilation;
    Coordinate along_x, along_y;
};

// What a pixel sees along an axis: the first pixel of its window, which may lie before the map, and the entry of the
// bias that belongs to it.
template <int kKernelSize>
struct WindowAlong {
    int first, entry;

    __device__ __forceinline__ WindowAlong(int pixel, int size, const NeighborhoodAttention& problem,
                                           const Divisor& dilation) {
        const int place = dilation.quotient(pixel), residue = pixel - place * problem.dilation;
        int start = place - kKernelSize / 2;
        if (problem.border == Definition<NeighborhoodAttention>::kShifted) {
            const int members = dilation.quotient(size - 1 - residue) + 1;  // pixels of the same residue
            start = min(max(start, 0), members - kKernelSize);
        }
        first = residue + start * problem.dilation;
        entry = start - place + kKernelSize - 1;
    }
};

// A window is read row by row, and a row's logits share one rescaling of what was summed before, as in local attention.
// Where a neighbour lies beyond the map the pixel itself is read and dropped. One block per run of pixels, head and
// image.
//
// `make instructions` counts by the headings Prologue, Rows and Epilogue.
template <Dtype kDtype, Layout kLayout, int kHeadDim, int kKernelSize>
__global__ void neighborhood_attention_simt_kernel(NeighborhoodAttention problem,
                                                   NeighborhoodPlan<kDtype, kLayout> plan,
                                                   const Element<kDtype>* __restrict__ qkv,
                                                   const Element<kDtype>* __restrict__ position_weight,
                                                   const Element<kDtype>* __restrict__ bias,
                                                   Element<kDtype>* __restrict__ y) {
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    constexpr int kEntries = 2 * kKernelSize - 1;

    // Prologue: the pixel, its query, and q.P. Lanes of channels that only fill up the last take part with zeros.
    const int height = problem.height, width = problem.width;
    const Group group;
    const int pixel = static_cast<int>(blockIdx.x) * Group::kPixelsPerBlock + group.pixel;
    const bool stored = pixel < height * width, padding = group.channel >= problem.head_dim;
    const int pixel_y = stored ? plan.width.quotient(pixel) : 0;
    const int pixel_x = stored ? pixel - pixel_y * width : 0;
    const int head = static_cast<int>(blockIdx.y), channels = problem.num_heads * problem.head_dim;
    const int head_channel = padding ? 0 : group.channel, channel = head * problem.head_dim + head_channel;
    const T* const image = qkv + blockIdx.z * plan.qkv.image;

    float query[kVector];
    load(query, plan.qkv.below(plan.qkv.at(image, channel, pixel_x), pixel_y), plan.qkv);
    const float scale = problem.scale * kLog2E;
    float along_x = 0, along_y = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        query[i] = padding ? 0 : query[i] * scale;
        along_x += query[i] * to_float(position_weight[(head_channel + i) * 2]);
        along_y += query[i] * to_float(position_weight[(head_channel + i) * 2 + 1]);
    }
    along_x = Group::sum(along_x);
    along_y = Group::sum(along_y);

    // Rows: what the columns have in common in all of them, then logits and weighted sums.
    const bool masked = problem.border != Definition<NeighborhoodAttention>::kZeros;
    const WindowAlong<kKernelSize> columns(pixel_x, width, problem, plan.dilation);
    const WindowAlong<kKernelSize> rows(pixel_y, height, problem, plan.dilation);
    int column[kKernelSize];
    float column_term[kKernelSize];
    bool column_inside[kKernelSize];
#pragma unroll
    for (int dx = 0; dx < kKernelSize; ++dx) {
        const int key_x = columns.first + dx * problem.dilation;
        column_inside[dx] = key_x >= 0 && key_x < width;
        column[dx] = (column_inside[dx] ? key_x : pixel_x) * plan.qkv.column;
        column_term[dx] = along_x * plan.along_x(key_x);
    }
    const T* row_bias = bias + (head * kEntries + rows.entry) * kEntries + columns.entry;
    // Below any logit, so that a row of which nothing is seen has weights of 0.
    float maximum = -FLT_MAX, sum = 0, attended[kVector] = {};
    const T* const keys = plan.qkv.at(image, channels + channel, 0);
#pragma unroll 1
    for (int dy = 0; dy < kKernelSize; ++dy) {
        const int key_y = rows.first + dy * problem.dilation;
        const bool row_inside = key_y >= 0 && key_y < height;
        const T* const row_keys = plan.qkv.below(keys, row_inside ? key_y : pixel_y);
        const T* const row_values = plan.qkv.at(row_keys, channels, 0);
        const float row_term = along_y * plan.along_y(key_y);
        float logits[kKernelSize], raised = maximum;
#pragma unroll
        for (int dx = 0; dx < kKernelSize; ++dx) {
            const bool inside = row_inside && column_inside[dx];
            float key[kVector], product = 0;
            load(key, row_keys + column[dx], plan.qkv);
#pragma unroll
            for (int i = 0; i < kVector; ++i) product += query[i] * key[i];
            product = Group::sum(product) - column_term[dx] - row_term;
            logits[dx] = (inside ? product : masked ? -INFINITY : 0) + to_float(row_bias[dx]) * kLog2E;
            raised = fmaxf(raised, logits[dx]);
        }
        const float rescale = ptx::exp2(maximum - raised);
        maximum = raised;
        sum *= rescale;
#pragma unroll
        for (int i = 0; i < kVector; ++i) attended[i] *= rescale;
#pragma unroll
        for (int dx = 0; dx < kKernelSize; ++dx) {
            float weight = ptx::exp2(logits[dx] - maximum);
            sum += weight;
            weight = row_inside && column_inside[dx] ? weight : 0;
            float value[kVector];
            load(value, row_values + column[dx], plan.qkv);
#pragma unroll
            for (int i = 0; i < kVector; ++i) attended[i] += weight * value[i];
        }
        row_bias += kEntries;
    }

    // Epilogue
    if (!stored || padding) return;
    const float factor = 1 / sum;
#pragma unroll
    for (int i = 0; i < kVector; ++i) attended[i] *= factor;
    save(plan.y.below(plan.y.at(y + blockIdx.z * plan.y.image, channel, pixel_x), pixel_y), attended, plan.y);
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t neighborhood_attention_simt(const NeighborhoodAttention& problem, const void* const* inputs, void* y,
                                        cudaStream_t stream) {
    using T = Element<kDtype>;
    using Group = LaneGroup<kLayout, kHeadDim>;
    const void *const qkv = inputs[0], *const position_weight = inputs[1], *const bias = inputs[2];
    if (kLayout == Layout::kNhwc && !(aligned(qkv, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    const int channels = problem.num_heads * problem.head_dim;
    const NeighborhoodPlan<kDtype, kLayout> plan{{3 * channels, problem.height, problem.width},
                                                 {channels, problem.height, problem.width},
                                                 Divisor(problem.width),
                                                 Divisor(problem.dilation),
                                                 Coordinate(problem.width),
                                                 Coordinate(problem.height)};
    const int runs = ceil_div(problem.height * problem.width, Group::kPixelsPerBlock);
    return with_constant<3, 5, 7, 9>(problem.kernel_size, [&](auto kernel_size) {
        return ptx::launch(neighborhood_attention_simt_kernel<kDtype, kLayout, kHeadDim, kernel_size>,
                           dim3(runs, problem.num_heads, problem.batch), dim3(Group::kThreads), 0, stream, problem,
                           plan, static_cast<const T*>(qkv), static_cast<const T*>(position_weight),
                           static_cast<const T*>(bias), static_cast<T*>(y));
    });
}

}  // namespace acmix
