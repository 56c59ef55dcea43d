// Neighborhood attention on tensor cores, for halves: every border and dilation.
//
// As local attention on tensor cores (see there), but that a block works on the pixels of one residue class modulo the
// dilation as if they were the map, and that a query's window begins where the border lets it: of the rows and columns
// around a tile the first one and those that a query sees are numbers of each query. What lies beyond the map stands as
// zeros in shared memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"
#include "acmix/tiles.cuh"

namespace acmix {

static_assert(*std::prev(std::end(Definition<NeighborhoodAttention>::kKernelSizes)) / 2 <= kMargin,
              "16 columns hold the margins of 8 queries");

template <Layout kLayout, int kHeadDim, int kKernelSize>
struct NeighborhoodShape : MmaShape<kLayout, kHeadDim, 1, kKernelSize> {
    using Base = MmaShape<kLayout, kHeadDim, 1, kKernelSize>;
    // Blocks of a multiprocessor for which registers are kept: as many as spill nothing, by what the compiler does.
    static constexpr int blocks(int architecture) {
        if (architecture < 800 || !Base::kFolded) return 1;
        if (kHeadDim > 32) return Base::kNhwc && kHeadDim == 64 && kKernelSize == 7 ? 1 : 2;
        return architecture > 900 ? 2 : 3;
    }
};

// What the host works out once for all blocks.
template <Layout kLayout>
struct NeighborhoodMmaPlan {
    int warps;             // of a block
    int rows;              // of keys that the queries of a block see
    int tiles_x, tiles_y;  // of a residue class
    Strides<__half, kLayout> qkv, y;
    Divisor heads, by_tiles_x, by_tiles_y, dilation;
    float scale;  // scale * log2(e)
    Coordinate along_x, along_y;
};

// The pixels of an axis of one residue class modulo the dilation.
struct ResidueClass {
    int residue, dilation, members, window;
    bool shifted;

    __device__ __forceinline__ ResidueClass(const NeighborhoodAttention& problem, const Divisor& by, int residue,
                                            int size)
        : residue(residue),
          dilation(problem.dilation),
          members(by.quotient(size - 1 - residue) + 1),
          window(problem.kernel_size),
          shifted(problem.border == Definition<NeighborhoodAttention>::kShifted) {}

    __device__ __forceinline__ int pixel(int member) const { return residue + member * dilation; }
    __device__ __forceinline__ bool holds(int member) const { return member >= 0 && member < members; }
    // The first of those that `member` sees, which may lie before the map.
    __device__ __forceinline__ int start(int member) const {
        const int first = member - window / 2;
        return shifted ? min(max(first, 0), members - window) : first;
    }
};

// Brings slices to shared memory. A warp takes whole rows, its lanes words of them: 8 channels of a pixel in NHWC, 4
// pixels of a channel in NCHW.
template <Layout kLayout, class Shape>
class NeighborhoodLoader {
 public:
    // `channel` is the first of the keys', `x` the first column's member of `along_x`. Lane (row - first_row) % 32 has
    // in `pixel_row` the place in the image of window row `row`, which is negative beyond it.
    __device__ __forceinline__ NeighborhoodLoader(const NeighborhoodAttention& problem,
                                                  const NeighborhoodMmaPlan<kLayout>& plan, const __half* image,
                                                  int channel, const ResidueClass& along_x, int x, int first_row,
                                                  int pixel_row)
        : plan_(plan),
          along_x_(along_x),
          head_dim_(problem.head_dim),
          warp_(threadIdx.x / 32),
          first_row_(first_row),
          pixel_row_(pixel_row),
          outer_(threadIdx.x % 32 / kSpan),
          inner_(threadIdx.x % kSpan) {
        const Buffer<kLayout, Shape> buffer(plan.rows);
        to_ = kNhwc ? buffer.at(outer_, inner_ * 8) : buffer.at(inner_ * 4, outer_);
        to_step_ = kNhwc ? kStep * Shape::kSlice : kStep * buffer.pitch;
        left_ = x + inner_ * 4;
        whole_ = problem.dilation == 1 && problem.width % 4 == 0 && aligned(image, 8) && left_ >= 0 &&
                 left_ + 4 <= problem.width;
        if constexpr (kNhwc) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                const int member = x + outer_ + i * kStep;
                inside_[i] = along_x.holds(member);
                from_[i] = plan.qkv.at(image, channel + inner_ * 8, inside_[i] ? along_x.pixel(member) : 0);
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
            const int channels = pixel_row < 0 ? 0 : inside;
            __half* to = buffer + (to_ + row * Buffer<kLayout, Shape>::kRow);
            if constexpr (kNhwc) {
#pragma unroll
                for (int i = 0; i < kWords; ++i) {
                    if (!present || outer_ + i * kStep >= Shape::kColumns) continue;
                    ptx::copy_async<16>(to + i * to_step_, plan_.qkv.below(from[i], max(pixel_row, 0)),
                                        channels > 0 && inside_[i]);
                }
            } else if (present && inner_ * 4 < Shape::kColumns) {
                const __half* word = plan_.qkv.below(from[0], max(pixel_row, 0));
                if (whole_) {
                    bring_whole(to, word, channels);
                } else {
                    bring_each(to, word, channels);
                }
            }
        }
        ptx::commit_copies();
    }

    static constexpr bool kNhwc = kLayout == Layout::kNhwc;
    static constexpr int kSpan = kNhwc ? Shape::kSlice / 8 : 4;  // lanes side by side
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

    // The same where some of the pixels are beyond the map or apart, or the words not aligned.
    __device__ __forceinline__ void bring_each(__half* to, const __half* from, int inside) const {
#pragma unroll 1
        for (int i = 0; i < kWords; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                to[j] = i * kStep < inside && along_x_.holds(left_ + j) ? from[along_x_.pixel(left_ + j)] : __half{};
            }
            to += to_step_;
            from = plan_.qkv.at(from, kStep, 0);
        }
    }

    const NeighborhoodMmaPlan<kLayout>& plan_;
    const ResidueClass& along_x_;
    const __half* from_[kNhwc ? kWords : 1];
    bool inside_[kNhwc ? kWords : 1];
    int head_dim_, warp_, first_row_, pixel_row_, outer_, inner_, to_, to_step_, left_;
    bool whole_;
};

// One block per tile of 8 x (2 * warps) queries of one residue class and head; heads of a tile follow each other, as
// they share pixels. Registers follow the fragments of mma.m16n8k16, as in local attention.
//
// `make instructions` counts by the headings Prologue, Loads, Rows and Epilogue.
template <Layout kLayout, int kHeadDim, int kKernelSize>
__global__ __launch_bounds__(
    NeighborhoodShape<kLayout, kHeadDim, kKernelSize>::kThreads,
    NeighborhoodShape<kLayout, kHeadDim, kKernelSize>::blocks(
        kArchitecture)) void neighborhood_attention_mma_kernel(NeighborhoodAttention problem,
                                                               NeighborhoodMmaPlan<kLayout> plan,
                                                               const __half* __restrict__ qkv,
                                                               const __half* __restrict__ position_weight,
                                                               const __half* __restrict__ bias,
                                                               __half* __restrict__ y) {
    using Shape = NeighborhoodShape<kLayout, kHeadDim, kKernelSize>;
    constexpr bool kNhwc = kLayout == Layout::kNhwc;
    constexpr int kTiles = Shape::kTiles, kRows = Shape::kRows, kKept = Shape::kKept, kSteps = Shape::kSteps;
    constexpr int kHeld = Shape::kTogether ? Shape::kSlices : 1;
    constexpr int kEntries = 2 * kKernelSize - 1;
    static_assert(kTiles == 2, "16 columns");

    // Prologue: the warp's queries, and the rows of keys around the block's.
    const int head_dim = problem.head_dim;
    const int column_tile = plan.heads.quotient(blockIdx.x);
    const int head = static_cast<int>(blockIdx.x) - column_tile * problem.num_heads;
    const int residue_x = plan.by_tiles_x.quotient(column_tile), residue_y = plan.by_tiles_y.quotient(blockIdx.y);
    const ResidueClass along_x(problem, plan.dilation, residue_x, problem.width);
    const ResidueClass along_y(problem, plan.dilation, residue_y, problem.height);
    const int tile_x = (column_tile - residue_x * plan.tiles_x) * kTileWidth;
    const int tile_y = (static_cast<int>(blockIdx.y) - residue_y * plan.tiles_y) * kWarpRows * plan.warps;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    // Queries past the end repeat the last one.
    const int query_x = min(tile_x + quad, along_x.members - 1);
    int query_y[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) query_y[i] = min(tile_y + warp * kWarpRows + i, along_y.members - 1);
    // At the end of a class windows may begin before the margin; in NCHW words of 4 pixels begin here.
    const int last_start = along_x.shifted ? (along_x.members - kKernelSize) & ~3 : tile_x;
    const int window_x = min(tile_x - kMargin, last_start);
    const int window_y = along_y.start(min(tile_y, along_y.members - 1));
    const int first_row = along_y.start(query_y[0]) - window_y;
    // Each lane knows where one of these rows lies in the image, lane 0 the first that the warp sees, in a circle.
    const int member_row = window_y + ((first_row + lane) & 31);
    const int pixel_row = along_y.holds(member_row) ? along_y.pixel(member_row) : -1;

    // Loads: keys and values, a slice in each of two buffers.
    const int channels = problem.num_heads * head_dim;
    const __half* const image = qkv + blockIdx.z * plan.qkv.image;
    const NeighborhoodLoader<kLayout, Shape> loader(problem, plan, image, channels + head * head_dim, along_x, window_x,
                                                    first_row, pixel_row);
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

    // Prologue: the queries, two neighbouring channels of every eight for a lane, and q.P, an mma with P's columns x
    // and y in turn.
    const __half* queries[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
        queries[i] = plan.qkv.below(plan.qkv.at(image, head * head_dim + pair, along_x.pixel(query_x)),
                                    along_y.pixel(query_y[i]));
    }
    std::uint32_t query[kHeld][kSteps][4];
    float position[4] = {};
    const auto load_query = [&](int slice) {
#pragma unroll
        for (int j = 0; j < kSteps * 4; ++j) {
            const int channel = slice * Shape::kSlice + j / 2 * 8;
            query[slice % kHeld][j / 4][j % 4] =
                channel + pair < head_dim ? load_pair(plan.qkv, plan.qkv.at(queries[j % 2], channel, 0)) : 0;
        }
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

    // The columns that the lane's logits belong to. Where columns are folded, `owner` tells from which tile they come.
    const bool masked = problem.border != Definition<NeighborhoodAttention>::kZeros;
    const int first_column = along_x.start(query_x) - window_x;
    float key_x[kKept][2];
    bool seen[kKept][2], column_inside[kKept][2], owner[2][kTiles];
    int column_entry[kKept][2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int kept = 0; kept < kKept; ++kept) {
            const int column = Shape::kFolded ? first_column + ((pair + e - first_column) & 7) : kept * 8 + pair + e;
            const int member = window_x + column;
            column_inside[kept][e] = along_x.holds(member);
            seen[kept][e] =
                static_cast<unsigned>(column - first_column) < kKernelSize && (column_inside[kept][e] || !masked);
            key_x[kept][e] = plan.along_x(along_x.pixel(member));
            column_entry[kept][e] = member - query_x + kKernelSize - 1;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) owner[e][t] = column >= t * 8 && column < t * 8 + 8;
        }
    }

    // Where the matrix rows stand that this lane names to load_matrices, a matrix being 8 columns by 8 channels. Of
    // four matrices it names a row of number lane / 8.
    const int matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
    const auto row_of = [&](int column_of_tiles, int channel_tile) {
        return kNhwc ? buffer.at(column_of_tiles * 8 + line, channel_tile * 8)
                     : buffer.at(column_of_tiles * 8, channel_tile * 8 + line);
    };
    constexpr int kRow = Buffer<kLayout, Shape>::kRow;
    int to_key[kSteps], to_value[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        to_key[step] = first_row * kRow + row_of(matrix / 2, step * 2 + matrix % 2);
        to_value[step] = first_row * kRow + row_of(matrix % 2, step * 2 + matrix / 2);
    }

    // Rows: products of queries and keys, by slices.
    float logits[kRows][kKept][4];
#pragma unroll
    for (int j = 0; j < kRows * kKept * 4; ++j) logits[j / (kKept * 4)][j / 4 % kKept][j % 4] = 0;
#pragma unroll
    for (int slice = 0; slice < kHeld; ++slice) load_query(slice);
#pragma unroll kHeld
    for (int slice = 0; slice < Shape::kSlices; ++slice) {
        if (slice >= kHeld) load_query(slice);
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
            }
#pragma unroll
            for (int j = 0; j < kKept * 4; ++j) {
                logits[row][j / 4][j % 4] =
                    Shape::kFolded ? (owner[j % 2][0] ? product[0][j % 4] : product[1][j % 4]) : product[j / 4][j % 4];
            }
        }
        release(slice);
    }

    // Rows: what the position and the biases add, and what a query does not see.
    const float key_y = plan.along_y(max(pixel_row, 0));
    const __half* const entries = bias + (head * kEntries * kEntries + min(lane, kEntries - 1));
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const float row_y = __shfl_sync(~0u, key_y, row);
        const bool row_inside = __shfl_sync(~0u, pixel_row, row) >= 0;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
            const int from_start = window_y + first_row + row - along_y.start(query_y[i]);
            const bool row_seen = static_cast<unsigned>(from_start) < kKernelSize && (row_inside || !masked);
            const int row_entry = row_seen ? window_y + first_row + row - query_y[i] + kKernelSize - 1 : 0;
            // A row of the table, an entry for each lane.
            const float entry = to_float(*ptx::advance(entries, row_entry, kEntries * sizeof(__half))) * kLog2E;
#pragma unroll
            for (int j = 0; j < kKept * 2; ++j) {
                const int kept = j / 2, e = j % 2;
                float& logit = logits[row][kept][i * 2 + e];
                const float away = fmaf(position[i * 2], key_x[kept][e], position[i * 2 + 1] * row_y);
                const float added = __shfl_sync(~0u, entry, column_entry[kept][e]);
                logit = fmaf(row_inside && column_inside[kept][e] ? logit - away : 0.0f, plan.scale, added);
                logit = row_seen && seen[kept][e] ? logit : -INFINITY;
            }
        }
    }

    // Rows: softmax. Numerators become halves in the columns of their own tiles, denominators come by a matrix of ones.
    float largest[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
        float maximum = -INFINITY;
#pragma unroll
        for (int j = 0; j < kRows * kKept; ++j) {
            const float (&of)[4] = logits[j / kKept][j % kKept];
            maximum = fmaxf(maximum, fmaxf(of[i * 2], of[i * 2 + 1]));
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
            const std::uint32_t pair_of =
                ptx::pack_half2(ptx::exp2(of[i * 2] - largest[i]), ptx::exp2(of[i * 2 + 1] - largest[i]));
            if constexpr (Shape::kFolded) {
#pragma unroll
                for (int t = 0; t < kTiles; ++t) weight[row][t][i] = pair_of & mask[t];
            } else {
                weight[row][kept][i] = pair_of;
            }
        }
        const auto& of = weight[row];
        ptx::mma_k16(sum, {of[0][0], of[0][1], of[1][0], of[1][1]}, ones, sum);
    }
    const float factor[kWarpRows] = {ptx::reciprocal(sum[0]), ptx::reciprocal(sum[2])};

    // Rows: the weighted sums of the values.
    const int pixel_x = along_x.pixel(query_x), pixel_y = along_y.pixel(query_y[0]);
    __half* const output =
        plan.y.below(plan.y.at(y + blockIdx.z * plan.y.image, head * head_dim + pair, pixel_x), pixel_y);
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
            }
        }
        if (!Shape::kTogether) release(stage);
        __syncwarp();

        // Epilogue: the slice's results.
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
            if (tile_x + quad >= along_x.members || tile_y + warp * kWarpRows + i >= along_y.members) continue;
#pragma unroll
            for (int t = 0; t < kSteps * 2; ++t) {
                const int channel = slice * Shape::kSlice + t * 8;
                if (channel >= head_dim) break;
                const float low = attended[t][i * 2] * factor[i], high = attended[t][i * 2 + 1] * factor[i];
                __half* const to = plan.y.at(i == 0 ? output : plan.y.below(output, problem.dilation), channel, 0);
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

template <Layout kLayout, int kHeadDim, int kKernelSize>
cudaError_t launch_neighborhood_attention_mma(const NeighborhoodAttention& problem, const void* const* inputs, void* y,
                                              cudaStream_t stream) {
    using Shape = NeighborhoodShape<kLayout, kHeadDim, kKernelSize>;
    const int channels = problem.num_heads * problem.head_dim;
    const int tiles_x = ceil_div(ceil_div(problem.width, problem.dilation), kTileWidth);
    const int pairs = ceil_div(ceil_div(problem.height, problem.dilation), kWarpRows);
    int warps = ceil_div(pairs, ceil_div(pairs, Shape::kWarps));
    while (Shape::block_rows(warps) > Shape::kTurns * warps) ++warps;
    const int rows = Shape::block_rows(warps), tiles_y = ceil_div(pairs, warps);
    const NeighborhoodMmaPlan<kLayout> plan{warps,
                                            rows,
                                            tiles_x,
                                            tiles_y,
                                            {3 * channels, problem.height, problem.width},
                                            {channels, problem.height, problem.width},
                                            Divisor(problem.num_heads),
                                            Divisor(tiles_x),
                                            Divisor(tiles_y),
                                            Divisor(problem.dilation),
                                            problem.scale * kLog2E,
                                            Coordinate(problem.width),
                                            Coordinate(problem.height)};
    const dim3 blocks(problem.num_heads * tiles_x * std::min(problem.dilation, problem.width),
                      tiles_y * std::min(problem.dilation, problem.height), problem.batch);
    return ptx::launch(neighborhood_attention_mma_kernel<kLayout, kHeadDim, kKernelSize>, blocks, dim3(warps * 32),
                       2 * Buffer<kLayout, Shape>(rows).halves * sizeof(__half), stream, problem, plan,
                       static_cast<const __half*>(inputs[0]), static_cast<const __half*>(inputs[1]),
                       static_cast<const __half*>(inputs[2]), static_cast<__half*>(y));
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t neighborhood_attention_mma(const NeighborhoodAttention& problem, const void* const* inputs, void* y,
                                       cudaStream_t stream) {
    static_assert(kDtype == Dtype::kFloat16, "tensor cores take halves here");
    if (kLayout == Layout::kNhwc && !(aligned(inputs[0], 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    return with_constant<3, 5, 7, 9>(problem.kernel_size, [&](auto kernel_size) {
        return launch_neighborhood_attention_mma<kLayout, kHeadDim, kernel_size>(problem, inputs, y, stream);
    });
}

}  // namespace acmix
