// How attention in local windows is cut for tensor cores: tiles of queries, and slices of the keys around them.
#pragma once

#include <algorithm>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

inline constexpr int kTileWidth = 8;  // queries of a warp along x: the lanes of a quad share one
inline constexpr int kWarpRows = 2;   // queries of a warp along y: the two halves of the 16 rows of an mma
inline constexpr int kMargin = 4;     // columns left of the first query

// Registers alone depend on it, and the host asks for none.
#ifdef __CUDA_ARCH__
inline constexpr int kArchitecture = __CUDA_ARCH__;
#else
inline constexpr int kArchitecture = 800;
#endif

template <Layout kLayout, int kHeadDim, int kStride, int kKernelSize>
struct MmaShape {
    static constexpr int kRows = (kWarpRows - 1) * kStride + kKernelSize;  // of keys that the queries of a warp see
    static constexpr int kTiles = kStride + 1;                             // of 8 columns
    static constexpr int kColumns = 8 * kTiles;
    static constexpr int kSlice = kStride == 1 ? std::min(kHeadDim, 32) : 16;  // channels
    static constexpr int kSlices = kHeadDim / kSlice;
    static constexpr bool kTogether = kSlices <= 2;  // registers hold the queries of all slices
    static constexpr int kSteps = kSlice / 16;       // of an mma along the channels of a slice
    static constexpr bool kFolded = kKernelSize <= 8;
    static constexpr int kKept = kFolded ? 1 : kTiles;  // 16x8 logits of a row of keys

    // Warps of a block at most, one below the other.
    static constexpr bool kNhwc = kLayout == Layout::kNhwc;
    static constexpr int kWarps = kNhwc && kHeadDim > 16 && kStride == 1 ? 5 : 4;
    static constexpr int kThreads = 32 * kWarps;
    // Blocks of a multiprocessor for which registers are kept: as many as spill nothing, by what the compiler does.
    static constexpr int blocks(int architecture) {
        if (architecture < 800) return 1;
        if (!kFolded) return architecture > 900 ? 1 : 2;
        if (kStride == 2 || kHeadDim > 32) return architecture < 900 ? 3 : 2;
        if (kHeadDim == 32) return architecture < 900 ? 4 : 3;
        return (kNhwc ? 7 : 6) - (architecture > 900 ? 2 : 0);
    }

    __host__ __device__ static constexpr int block_rows(int warps) {
        return (kWarpRows * warps - 1) * kStride + kKernelSize;
    }
    // Turns in which a warp loads rows. All but the last are full, whatever the number of warps.
    static constexpr int kTurns = ceil_div(block_rows(kWarps), kWarps);
    static_assert(block_rows(kWarps) <= 32, "each row of keys is known to one lane");

    // Whether the warp's queries of row i see row `row` of its keys.
    __host__ __device__ static constexpr bool sees(int i, int row) {
        return row >= i * kStride && row < i * kStride + kKernelSize;
    }
};

// A slice of keys or values in shared memory. NHWC: [row, column, channel], the 16-byte words of a pixel in an order in
// which those of neighbours lie in different banks. NCHW: [channel, row, column] with a pitch that does the same.
template <Layout kLayout, class Shape>
struct Buffer {
    static constexpr bool kNhwc = kLayout == Layout::kNhwc;
    static constexpr int kWords = Shape::kSlice / 8;
    static constexpr int kRow = kNhwc ? Shape::kColumns * Shape::kSlice : Shape::kColumns;  // halves from row to row
    int pitch;                                                                              // from channel to channel
    int halves;

    __host__ __device__ explicit Buffer(int rows)
        : pitch((rows * Shape::kColumns / 8 | 1) * 8), halves(kNhwc ? rows * kRow : Shape::kSlice * pitch) {}

    // Of the first row.
    __device__ __forceinline__ int at(int column, int channel) const {
        const int word = (channel / 8) ^ (column * kWords / 8 % kWords);
        return kNhwc ? column * Shape::kSlice + word * 8 + channel % 8 : channel * pitch + column;
    }
};

// Two neighbouring channels of a pixel as one register.
template <Layout kLayout>
__device__ __forceinline__ std::uint32_t load_pair(const Strides<__half, kLayout>& strides, const __half* from) {
    if constexpr (kLayout == Layout::kNhwc) {
        return *reinterpret_cast<const std::uint32_t*>(from);
    } else {
        const auto low = *reinterpret_cast<const std::uint16_t*>(from);
        const auto high = *reinterpret_cast<const std::uint16_t*>(strides.at(from, 1, 0));
        return low | static_cast<std::uint32_t>(high) << 16;
    }
}

}  // namespace acmix
