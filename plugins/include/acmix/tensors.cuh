// How tensors are addressed: layouts, element types, reflected borders.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "acmix/operators.h"
#include "acmix/ptx.cuh"

namespace acmix {

template <Dtype>
struct ElementOf {
    using Type = float;
};
template <>
struct ElementOf<Dtype::kFloat16> {
    using Type = __half;
};
template <Dtype kDtype>
using Element = typename ElementOf<kDtype>::Type;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half_rn(x); }

inline constexpr float kLog2E = 1.44269504f;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The pixel that reflection padding shows at position i of an axis, for -size < i < 2 * size - 1. Positions further
// out, which no query that is stored ever sees, stay inside the axis.
__device__ __forceinline__ int reflect(int i, int size) { return max(min(abs(i), 2 * (size - 1) - abs(i)), 0); }

// From -1 at the first pixel of an axis to 1 at the last; -1 where it is the only one.
struct Coordinate {
    float step;
    __host__ __device__ explicit Coordinate(int size) : step(2.0f / static_cast<float>(size > 1 ? size - 1 : 1)) {}
    __device__ __forceinline__ float operator()(int pixel) const { return static_cast<float>(pixel) * step - 1.0f; }
};

// Quotients of numbers below 2^31 by one divisor: a product and a shift.
struct Divisor {
    std::uint32_t multiplier = 0;
    std::int32_t shift = 31;

    explicit Divisor(int divisor) {
        while ((std::int64_t{1} << (shift - 31)) < divisor) ++shift;
        multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + divisor - 1) / divisor);
    }

    __device__ __forceinline__ int quotient(std::uint32_t number) const {
        return static_cast<int>(static_cast<std::uint64_t>(number) * multiplier >> shift);
    }
};

// The tensor's elements by addresses alone, so that 32 bits suffice for what is counted.
template <class T, Layout kLayout>
struct Strides {
    std::int64_t image;    // elements from image to image
    std::int64_t channel;  // the same from channel to channel
    std::int32_t column;   // and from pixel to pixel of a row
    std::uint32_t row;     // bytes from row to row

    Strides(int channels, int height, int width)
        : image(static_cast<std::int64_t>(channels) * height * width),
          channel(kLayout == Layout::kNhwc ? 1 : static_cast<std::int64_t>(height) * width),
          column(kLayout == Layout::kNhwc ? channels : 1),
          row(static_cast<std::uint32_t>(column) * width * static_cast<std::uint32_t>(sizeof(T))) {}

    // The element that lies so many channels and columns behind `from`, in the same row.
    template <class Pointer>
    __device__ __forceinline__ Pointer at(Pointer from, int channels, int columns) const {
        return kLayout == Layout::kNhwc ? from + (channels + columns * column) : from + (channels * channel + columns);
    }

    // The element `rows` rows below `from`.
    template <class Pointer>
    __device__ __forceinline__ Pointer below(Pointer from, int rows) const {
        return ptx::advance(from, rows, row);
    }
};

// function(c) for that one of the constants that `value` is; cudaErrorInvalidValue for none.
template <int... kConstants, class Function>
cudaError_t with_constant(int value, Function&& function) {
    cudaError_t result = cudaErrorInvalidValue;
    (void)((value == kConstants && (result = function(std::integral_constant<int, kConstants>{}), true)) || ...);
    return result;
}

inline constexpr int kVector = 8;  // channels that one lane holds in the scalar kernels, one 16-byte word of halves

// kVector channels of a pixel, from the one at `from` on. NHWC wants it aligned to 16 bytes.
template <class T, Layout kLayout>
__device__ __forceinline__ void load(float (&values)[kVector], const T* from, const Strides<T, kLayout>& strides) {
    if constexpr (kLayout == Layout::kNhwc) {
        alignas(16) T word[kVector];
#pragma unroll
        for (std::size_t i = 0; i < sizeof(word) / sizeof(uint4); ++i) {
            reinterpret_cast<uint4*>(word)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = to_float(word[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = to_float(*strides.at(from, i, 0));
    }
}

// The reverse, under the same condition.
template <class T, Layout kLayout>
__device__ __forceinline__ void save(T* to, const float (&values)[kVector], const Strides<T, kLayout>& strides) {
    if constexpr (kLayout == Layout::kNhwc) {
        alignas(16) T word[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) store(&word[i], values[i]);
#pragma unroll
        for (std::size_t i = 0; i < sizeof(word) / sizeof(uint4); ++i) {
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(word)[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) store(strides.at(to, i, 0), values[i]);
    }
}

__host__ __device__ inline bool aligned(const void* pointer, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// The scalar kernels: kHeadDim / kVector lanes of a warp share one output pixel of one head.
template <Layout kLayout, int kHeadDim>
struct LaneGroup {
    static constexpr int kLanes = kHeadDim / kVector;
    static constexpr int kPixels = 32 / kLanes;
    static constexpr int kThreads = 128;
    static constexpr int kPixelsPerBlock = kThreads / kLanes;

    // Neighbouring lanes take neighbouring addresses: channels in NHWC, pixels in NCHW.
    static constexpr int kLaneStep = kLayout == Layout::kNhwc ? 1 : kPixels;
    static constexpr int kPixelStep = kLayout == Layout::kNhwc ? kLanes : 1;

    int channel;  // first of this lane's channels within the head
    int pixel;    // place of the pixel among the block's

    __device__ __forceinline__ LaneGroup() {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        channel = lane / kLaneStep % kLanes * kVector;
        pixel = static_cast<int>(threadIdx.x) / 32 * kPixels + lane / kPixelStep % kPixels;
    }

    // The sum over the lanes of a pixel, in every one of them. The whole warp takes part.
    __device__ __forceinline__ static float sum(float x) {
#pragma unroll
        for (int offset = kLaneStep; offset < kLaneStep * kLanes; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
        return x;
    }
};

}  // namespace acmix
