// Local attention on tensor cores, for halves.
//
// A warp owns 16 queries, 2 rows of 8, and walks twice down the rows of keys that their windows touch: once for the
// logits, which it holds in registers, and once for the sum of the values. A row of keys is 8 * stride columns for the
// queries and 8 for the margins: two or three 16x8 products with the queries. A query sees neighbouring columns, of
// which up to 8 differ modulo 8. So of the columns of the products that are equal modulo 8 at most one is the query's
// own: the others are dropped before the exponential, and stand as zeros beside its weight afterwards.
//
// Keys, then values pass through two buffers of shared memory in slices of channels, one slice while the other is used.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <iterator>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"
#include "acmix/tiles.cuh"

namespace acmix {

static_assert(*std::prev(std::end(Definition<LocalAttention>::kKernelSizes)) / 2 <= kMargin,
              "8 * (stride + 1) columns hold the margins of 8 queries");

// What the host works out once for all blocks.
template <Layout kLayout>
struct MmaPlan {
    int warps;  // of a block
    int rows;   // of keys that the queries of a block see
    Strides<__half, kLayout> qkv, y;
    Divisor heads;
    float scale;         // |scale| * log2(e)
    std::uint32_t sign;  // flips the queries where the scale is negative
    Coordinate along_x, along_y;
};

// Brings slices to shared memory. A warp takes whole rows, its lanes words of them: 8 channels of a pixel in NHWC, 4
// pixels of a channel in NCHW.
template <Layout kLayout, class Shape>
class Loader {
 public:
    // `channel` is the first of the keys', `x` the first column before reflection. Lane (row - first_row) % 32 has in
    // `pixel_row` the place in the image of window row `row`.
    __device__ __forceinline__ Loader(const LocalAttention& problem, const MmaPlan<kLayout>& plan, const __half* image,
                                      int channel, int x, int first_row, int pixel_row)
        : plan_(plan),
          head_dim_(problem.head_dim),
          width_(problem.width),
          warp_(threadIdx.x / 32),
          first_row_(first_row),
          pixel_row_(pixel_row),
          outer_(threadIdx.x % 32 / kSpan),
          inner_(threadIdx.x % kSpan) {
        const Buffer<kLayout, Shape> buffer(plan.rows);
        to_ = kNhwc ? buffer.at(outer_, inner_ * 8) : buffer.at(inner_ * 4, outer_);
        to_step_ = kNhwc ? kStep * Shape::kSlice : kStep * buffer.pitch;
        left_ = x + inner_ * 4;
        whole_ = width_ % 4 == 0 && aligned(image, 8) && left_ >= 0 && left_ + 4 <= width_;
        if constexpr (kNhwc) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                from_[i] = plan.qkv.at(image, channel + inner_ * 8, reflect(x + outer_ + i * kStep, width_));
            }
        } else {
            from_[0] = plan.qkv.at(image, channel + outer_, 0);
        }
    }

    // Begin to copy a slice of the channels that lie `offset` behind the keys' to `buffer`.
    __device__ __forceinline__ void bring(__half* buffer, int offset, int slice) const {
        const int channel = slice * Shape::kSlice;
        const int inside = head_dim_ - channel - (kNhwc ? inner_ * 8 : outer_);  // channels from the lane's first on
        const __half* from[kNhwc ? kWords : 1];
#pragma unroll
        for (int i = 0; i < (kNhwc ? kWords : 1); ++i) from[i] = plan_.qkv.at(from_[i], offset + channel, 0);
#pragma unroll kNhwc ? Shape::kTurns : 1
        for (int turn = 0; turn < Shape::kTurns; ++turn) {
            const int row = warp_ + turn * plan_.warps;
            const int pixel_row = __shfl_sync(~0u, pixel_row_, row - first_row_);
            const bool present = turn + 1 < Shape::kTurns || row < plan_.rows;
            __half* to = buffer + (to_ + row * Buffer<kLayout, Shape>::kRow);
            if constexpr (kNhwc) {
#pragma unroll
                for (int i = 0; i < kWords; ++i) {
                    if (!present || outer_ + i * kStep >= Shape::kColumns) continue;
                    ptx::copy_async<16>(to + i * to_step_, plan_.qkv.below(from[i], pixel_row), inside > 0);
                }
            } else if (present && inner_ * 4 < Shape::kColumns) {
                const __half* word = plan_.qkv.below(from[0], pixel_row);
                if (whole_) {
                    bring_whole(to, word, inside);
                } else {
                    bring_each(to, word, inside);
                }
            }
        }
        ptx::commit_copies();
    }

    static constexpr bool kNhwc = kLayout == Layout::kNhwc;
    static constexpr int kSpan = kNhwc ? Shape::kSlice / 8 : Shape::kColumns == 16 ? 4 : 8;  // lanes side by side
    static constexpr int kStep = 32 / kSpan;  // pixels (NHWC) or channels (NCHW) that a warp takes at once
    static constexpr int kWords = ceil_div(kNhwc ? Shape::kColumns : Shape::kSlice, kStep);  // of a lane in a row

 private:
    // NCHW: a lane's words of a row, four pixels of every kStep-th channel.
    __device__ __forceinline__ void bring_whole(__half* to, const __half* from, int inside) const {
        from += left_;
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            ptx::copy_async<8>(to, from, i * kStep < inside);
            to += to_step_;
            from = plan_.qkv.at(from, kStep, 0);
        }
    }

    // The same where some of the pixels are reflected, or the words not aligned.
    __device__ __forceinline__ void bring_each(__half* to, const __half* from, int inside) const {
#pragma unroll 1
        for (int i = 0; i < kWords; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) to[j] = i * kStep < inside ? from[reflect(left_ + j, width_)] : __half{};
            to += to_step_;
            from = plan_.qkv.at(from, kStep, 0);
        }
    }

    const MmaPlan<kLayout>& plan_;
    const __half* from_[kNhwc ? kWords : 1];
    int head_dim_, width_, warp_, first_row_, pixel_row_, outer_, inner_, to_, to_step_, left_;
    bool whole_;
};

// One block per tile of 8 x (2 * warps) queries of one head; heads of a tile follow each other, as they share pixels.
//
// Registers follow the fragments of mma.m16n8k16: of a 16x8 result a lane holds columns 2 * (lane % 4) and the next, of
// rows lane / 4 (elements 0, 1) and lane / 4 + 8 (elements 2, 3). Row r is query (r % 8, r / 8) of the warp's 8 x 2.
//
// `make instructions` counts by the headings Prologue, Loads, Rows and Epilogue.
template <Layout kLayout, int kHeadDim, int kStride, int kKernelSize>
__global__ __launch_bounds__(
    MmaShape<kLayout, kHeadDim, kStride, kKernelSize>::kThreads,
    MmaShape<kLayout, kHeadDim, kStride, kKernelSize>::blocks(
        kArchitecture)) void local_attention_mma_kernel(LocalAttention problem, MmaPlan<kLayout> plan,
                                                        const __half* __restrict__ qkv,
                                                        const __half* __restrict__ position_weight,
                                                        __half* __restrict__ y) {
    using Shape = MmaShape<kLayout, kHeadDim, kStride, kKernelSize>;
    constexpr bool kNhwc = kLayout == Layout::kNhwc;
    constexpr int kTiles = Shape::kTiles, kRows = Shape::kRows, kKept = Shape::kKept, kSteps = Shape::kSteps;
    constexpr int kHeld = Shape::kTogether ? Shape::kSlices : 1;

    // Prologue: the warp's queries, and the rows of keys around the block's.
    const int height = problem.height, width = problem.width, head_dim = problem.head_dim;
    const int out_height = height / kStride, out_width = width / kStride;
    const int tile = plan.heads.quotient(blockIdx.x), head = static_cast<int>(blockIdx.x) - tile * problem.num_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    const int tile_y = static_cast<int>(blockIdx.y) * kWarpRows * plan.warps;
    const int out_x = tile * kTileWidth + quad, out_y = tile_y + warp * kWarpRows;
    const int window_x = tile * kTileWidth * kStride - kMargin, window_y = tile_y * kStride - kKernelSize / 2;
    // Each lane knows where one of these rows lies in the image, lane 0 the first that the warp sees, in a circle.
    const int first_row = warp * kWarpRows * kStride;
    const int pixel_row = reflect(window_y + ((first_row + lane) & 31), height);

    // Loads: keys and values, a slice in each of two buffers.
    const int channels = problem.num_heads * head_dim;
    const __half* const image = qkv + blockIdx.z * plan.qkv.image;
    const Loader<kLayout, Shape> loader(problem, plan, image, channels + head * head_dim, window_x, first_row,
                                        pixel_row);
    const Buffer<kLayout, Shape> buffer(plan.rows);
    auto* const shared = reinterpret_cast<__half*>(ptx::dynamic_shared());
    const auto bring = [&](int stage) {
        loader.bring(shared + stage % 2 * buffer.halves, stage / Shape::kSlices * channels, stage % Shape::kSlices);
    };
    constexpr int kStages = 2 * Shape::kSlices;
    bring(0);
    bring(1);
    const auto wait_for = [&](int stage) {
        if (stage + 1 < kStages) {
            ptx::wait_for_copies<1>();
        } else {
            ptx::wait_for_copies<0>();
        }
        __syncthreads();
    };
    const auto release = [&](int stage) {
        if (stage + 2 >= kStages) return;
        __syncthreads();
        bring(stage + 2);
    };

    // Prologue: where the first query's result goes, and the queries, two neighbouring channels of every eight for a
    // lane. The sign of the scale goes into them.
    __half* const output = plan.y.below(plan.y.at(y + blockIdx.z * plan.y.image, head * head_dim + pair, out_x), out_y);
    const __half* queries[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
        queries[i] = plan.qkv.below(plan.qkv.at(image, head * head_dim + pair, min(out_x, out_width - 1) * kStride),
                                    min(out_y + i, out_height - 1) * kStride);
    }
    std::uint32_t query[kHeld][kSteps][4];
    const auto load_query = [&](int slice) {
#pragma unroll
        for (int j = 0; j < kSteps * 4; ++j) {
            const int channel = slice * Shape::kSlice + j / 2 * 8;
            query[slice % kHeld][j / 4][j % 4] =
                channel + pair < head_dim ? load_pair(plan.qkv, plan.qkv.at(queries[j % 2], channel, 0)) ^ plan.sign
                                          : 0;
        }
        __syncwarp();
    };

    // q.P: an mma with P's columns x and y in turn.
    float position[4] = {};
    const auto add_position = [&](int slice) {
        if (position_weight == nullptr) return;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            std::uint32_t weight[2] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int channel = slice * Shape::kSlice + step * 16 + half * 8 + pair;
                if (channel >= head_dim) continue;
                const auto* from = reinterpret_cast<const std::uint16_t*>(position_weight) + channel * 2 + quad % 2;
                weight[half] = from[0] | static_cast<std::uint32_t>(from[2]) << 16;
            }
            __syncwarp();
            ptx::mma_k16(position, query[slice % kHeld][step], weight, position);
        }
    };
#pragma unroll
    for (int slice = 0; slice < kHeld; ++slice) {
        load_query(slice);
        add_position(slice);
    }

    // The columns that the lane's logits belong to. Where columns are folded, `owner` tells from which tile they come.
    float key_x[kKept][2];
    bool seen[kKept][2], owner[2][kTiles];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int first = kMargin - kKernelSize / 2 + quad * kStride;
#pragma unroll
        for (int kept = 0; kept < kKept; ++kept) {
            const int column = Shape::kFolded ? first + ((pair + e - first) & 7) : kept * 8 + pair + e;
            seen[kept][e] = static_cast<unsigned>(column - first) < kKernelSize;
            key_x[kept][e] = plan.along_x(reflect(window_x + column, width));
#pragma unroll
            for (int t = 0; t < kTiles; ++t) owner[e][t] = column >= t * 8 && column < t * 8 + 8;
        }
    }

    // Where the matrix rows stand that this lane names to load_matrices, a matrix being 8 columns by 8 channels. Of
    // four matrices it names a row of number lane / 8. `third` is the third tile of columns, where the stride is 2.
    const int matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
    const auto row_of = [&](int column_tile, int channel_tile) {
        return kNhwc ? buffer.at(column_tile * 8 + line, channel_tile * 8)
                     : buffer.at(column_tile * 8, channel_tile * 8 + line);
    };
    constexpr int kRow = Buffer<kLayout, Shape>::kRow;
    int to_key[kSteps], to_value[kSteps], to_third[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        to_key[step] = first_row * kRow + row_of(matrix / 2, step * 2 + matrix % 2);
        to_value[step] = first_row * kRow + row_of(matrix % 2, step * 2 + matrix / 2);
        to_third[step] = first_row * kRow + row_of(2, step * 2 + matrix % 2);
    }

    // Rows: logits, by slices; and the position, which wants all of q.P and hides what is outside the window.
    const float key_y = plan.along_y(pixel_row);
    float logits[kRows][kKept][4];
    const auto place_logits = [&] {
        float column_term[kKept][4];
#pragma unroll
        for (int j = 0; j < kKept * 4; ++j) {
            const int kept = j / 4, i = j / 2 % 2, e = j % 2;
            column_term[kept][j % 4] = seen[kept][e] ? -position[i * 2] * key_x[kept][e] : -INFINITY;
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float row_y = __shfl_sync(~0u, key_y, row);
#pragma unroll
            for (int j = 0; j < kKept * 4; ++j) {
                const float term = fmaf(-position[j / 2 % 2 * 2 + 1], row_y, column_term[j / 4][j % 4]);
                logits[row][j / 4][j % 4] = Shape::kTogether ? term : logits[row][j / 4][j % 4] + term;
            }
        }
    };
    if constexpr (Shape::kTogether) {
        place_logits();
    } else {
#pragma unroll
        for (int j = 0; j < kRows * kKept * 4; ++j) logits[j / (kKept * 4)][j / 4 % kKept][j % 4] = 0;
    }
#pragma unroll kHeld
    for (int slice = 0; slice < Shape::kSlices; ++slice) {
        if (slice >= kHeld) {
            load_query(slice);
            add_position(slice);
        }
        wait_for(slice);
        const __half* const keys = shared + slice % 2 * buffer.halves;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            float product[kTiles][4];
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                const auto add_to = [&](int t) -> const float (&)[4] {
                    return step == 0 ? logits[row][Shape::kFolded ? 0 : t] : product[t];
                };
                std::uint32_t key[4];
                ptx::load_matrices<!kNhwc>(key, keys + to_key[step] + row * kRow);
                ptx::mma_k16(product[0], query[slice % kHeld][step], {key[0], key[1]}, add_to(0));
                ptx::mma_k16(product[1], query[slice % kHeld][step], {key[2], key[3]}, add_to(1));
                if constexpr (kTiles == 3) {
                    std::uint32_t third[2];
                    ptx::load_matrices<!kNhwc>(third, keys + to_third[step] + row * kRow);
                    ptx::mma_k16(product[2], query[slice % kHeld][step], third, add_to(2));
                }
            }
#pragma unroll
            for (int j = 0; j < kKept * 4; ++j) {
                float kept = product[kTiles - 1][j % 4];
                if constexpr (Shape::kFolded) {
#pragma unroll
                    for (int t = kTiles - 2; t >= 0; --t) kept = owner[j % 2][t] ? product[t][j % 4] : kept;
                } else {
                    kept = product[j / 4][j % 4];
                }
                logits[row][j / 4][j % 4] = kept;
            }
        }
        release(slice);
    }
    if constexpr (!Shape::kTogether) place_logits();

    // Rows: softmax. Numerators become halves in the columns of their own tiles, denominators come by a matrix of ones.
    float largest[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
        float maximum = -INFINITY;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if (!Shape::sees(i, row)) continue;
#pragma unroll
            for (int kept = 0; kept < kKept; ++kept) {
                maximum = fmaxf(maximum, fmaxf(logits[row][kept][i * 2], logits[row][kept][i * 2 + 1]));
            }
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
        largest[i] = maximum;
    }
    std::uint32_t mask[kTiles], weight[kRows][kTiles][kWarpRows];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        mask[t] = (owner[0][t] ? 0xffffu : 0u) | (owner[1][t] ? 0xffff0000u : 0u);
    }
    float sum[4] = {};
    const std::uint32_t ones[2] = {0x3c003c00u, 0x3c003c00u};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int j = 0; j < kKept * kWarpRows; ++j) {
            const int kept = j / kWarpRows, i = j % kWarpRows;
            const float (&of)[4] = logits[row][kept];
            const std::uint32_t pair_of = Shape::sees(i, row)
                                              ? ptx::pack_half2(ptx::exp2((of[i * 2] - largest[i]) * plan.scale),
                                                                ptx::exp2((of[i * 2 + 1] - largest[i]) * plan.scale))
                                              : 0;
            if constexpr (Shape::kFolded) {
#pragma unroll
                for (int t = 0; t < kTiles; ++t) weight[row][t][i] = pair_of & mask[t];
            } else {
                weight[row][kept][i] = pair_of;
            }
        }
        const auto& of = weight[row];
        ptx::mma_k16(sum, {of[0][0], of[0][1], of[1][0], of[1][1]}, ones, sum);
        if constexpr (kTiles == 3) ptx::mma_k8(sum, of[2], ones[0], sum);
    }
    const float factor[kWarpRows] = {ptx::reciprocal(sum[0]), ptx::reciprocal(sum[2])};

    // Rows: the weighted sums of the values.
#pragma unroll 1
    for (int slice = 0; slice < Shape::kSlices; ++slice) {
        const int stage = Shape::kSlices + slice;
        wait_for(stage);
        const __half* const values = shared + stage % 2 * buffer.halves;
        float attended[kSteps * 2][4] = {};
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const auto& of = weight[row];
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                float (&low)[4] = attended[step * 2], (&high)[4] = attended[step * 2 + 1];
                std::uint32_t value[4];
                ptx::load_matrices<kNhwc>(value, values + to_value[step] + row * kRow);
                ptx::mma_k16(low, {of[0][0], of[0][1], of[1][0], of[1][1]}, {value[0], value[1]}, low);
                ptx::mma_k16(high, {of[0][0], of[0][1], of[1][0], of[1][1]}, {value[2], value[3]}, high);
                if constexpr (kTiles == 3) {
                    std::uint32_t third[2];
                    ptx::load_matrices<kNhwc>(third, values + to_third[step] + row * kRow);
                    ptx::mma_k8(low, of[2], third[0], low);
                    ptx::mma_k8(high, of[2], third[1], high);
                }
            }
        }
        if (!Shape::kTogether) release(stage);
        __syncwarp();

        // Epilogue: the slice's results.
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
            if (out_x >= out_width || out_y + i >= out_height) continue;
#pragma unroll
            for (int t = 0; t < kSteps * 2; ++t) {
                const int channel = slice * Shape::kSlice + t * 8;
                if (channel >= head_dim) break;
                const float low = attended[t][i * 2] * factor[i], high = attended[t][i * 2 + 1] * factor[i];
                __half* const to = plan.y.at(i == 0 ? output : plan.y.below(output, i), channel, 0);
                if constexpr (kNhwc) {
                    *reinterpret_cast<std::uint32_t*>(to) = ptx::pack_half2(low, high);
                } else {
                    store(to, low);
                    store(plan.y.at(to, 1, 0), high);
                }
            }
        }
    }
}

template <Layout kLayout, int kHeadDim, int kStride, int kKernelSize>
cudaError_t launch_local_attention_mma(const LocalAttention& problem, const void* qkv, const void* position_weight,
                                       void* y, cudaStream_t stream) {
    using Shape = MmaShape<kLayout, kHeadDim, kStride, kKernelSize>;
    const int out_height = problem.height / kStride, out_width = problem.width / kStride;
    const int channels = problem.num_heads * problem.head_dim, tiles_x = ceil_div(out_width, kTileWidth);
    const int pairs = ceil_div(out_height, kWarpRows);
    int warps = ceil_div(pairs, ceil_div(pairs, Shape::kWarps));
    while (Shape::block_rows(warps) > Shape::kTurns * warps) ++warps;
    const int rows = Shape::block_rows(warps);
    // FLT_MIN keeps a scale of 0 away from 0 * inf.
    const MmaPlan<kLayout> plan{warps,
                                rows,
                                {3 * channels, problem.height, problem.width},
                                {channels, out_height, out_width},
                                Divisor(problem.num_heads),
                                std::max(std::fabs(problem.scale) * kLog2E, FLT_MIN),
                                problem.scale < 0 ? 0x80008000u : 0u,
                                Coordinate(problem.width),
                                Coordinate(problem.height)};
    return ptx::launch(local_attention_mma_kernel<kLayout, kHeadDim, kStride, kKernelSize>,
                       dim3(problem.num_heads * tiles_x, ceil_div(pairs, warps), problem.batch), dim3(warps * 32),
                       2 * Buffer<kLayout, Shape>(rows).halves * sizeof(__half), stream, problem, plan,
                       static_cast<const __half*>(qkv), static_cast<const __half*>(position_weight),
                       static_cast<__half*>(y));
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t local_attention_mma(const LocalAttention& problem, const void* const* inputs, void* y,
                                cudaStream_t stream) {
    static_assert(kDtype == Dtype::kFloat16, "tensor cores take halves here");
    const void *const qkv = inputs[0], *const position_weight = inputs[1];  // the latter null for none
    if (kLayout == Layout::kNhwc && !(aligned(qkv, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    return with_constant<3, 5, 7, 9>(problem.kernel_size, [&](auto kernel_size) {
        const auto launch = problem.stride == 1 ? launch_local_attention_mma<kLayout, kHeadDim, 1, kernel_size>
                                                : launch_local_attention_mma<kLayout, kHeadDim, 2, kernel_size>;
        return launch(problem, qkv, position_weight, y, stream);
    });
}

}  // namespace acmix
