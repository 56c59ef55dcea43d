// Local attention on tensor cores, for halves.
//
// A warp owns 16 queries, 2 rows of 8, and walks down the rows of keys that their windows touch. A row of keys is 8
// columns for every query column and 8 for the margins, so kernel sizes up to 9 take the same 8 * (stride + 1) columns:
// two or three 16x8 products with the queries. Keys outside a query's window get the logit -inf. The keys and values of
// a block's warps come to shared memory in stages of whole rows, the next stage while the present one is computed.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <iterator>

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

inline constexpr int kTileWidth = 8;  // queries of a warp along x: the lanes of a quad share one
inline constexpr int kWarpRows = 2;   // queries of a warp along y: the two halves of the 16 rows of an mma
inline constexpr int kMaxWarps = 4;   // warps of a block, one below the other
inline constexpr int kMargin = 4;     // columns left of the first query
static_assert(*std::prev(std::end(Definition<LocalAttention>::kKernelSizes)) / 2 <= kMargin,
              "8 * (stride + 1) columns hold the margins of 8 queries");

// The sums are rescaled only when a logit outgrows the maximum in use by more than kSlack powers of two: weights up to
// 2^kSlack are as exact in half as weights up to 1, and most rows of keys need no exchange between lanes.
inline constexpr float kSlack = 8;
inline constexpr float kNoMaximum = -1e30f;  // finite, so that a masked logit of -inf weighs 0 against it

// What the host works out once for all blocks.
struct MmaPlan {
    int warps;           // of a block, a power of two
    int stages;          // through which the window passes shared memory
    int rows;            // of keys in a stage
    int columns;         // of keys
    int buffers;         // of one stage each
    float scale;         // |scale| * log2(e): logits are compared in units of 1 / scale
    float slack;         // kSlack in these units
    std::uint32_t sign;  // flips the queries where the scale is negative
    Coordinate x, y;
};

// One buffer of shared memory: keys, then values, of `rows` x `columns` pixels. NHWC: [row, column, channel],
// NCHW: [channel, row, column], each as it comes from global memory. The pitch keeps 16-byte words of neighbouring
// matrix rows in different banks.
template <Layout kLayout, int kHeadDim>
struct Buffer {
    int columns;
    int pitch;  // halves from pixel to pixel (NHWC) or from channel to channel (NCHW)
    int part;   // halves from keys to values

    __host__ __device__ Buffer(int rows, int columns)
        : columns(columns),
          pitch(kLayout == Layout::kNhwc ? kHeadDim + 8 : (rows * columns / 8 | 1) * 8),
          part(kLayout == Layout::kNhwc ? rows * columns * pitch : kHeadDim * pitch) {}

    __host__ __device__ int halves() const { return 2 * part; }

    __device__ __forceinline__ int at(int row, int column, int channel) const {
        return kLayout == Layout::kNhwc ? (row * columns + column) * pitch + channel
                                        : channel * pitch + row * columns + column;
    }
};

// What a block needs to know of its input to bring rows of keys and values to shared memory.
template <Layout kLayout, int kHeadDim>
struct Window {
    Image<const __half, kLayout> input;
    std::int64_t key_channel, value_channel;
    int head_dim, height, width;
    int x, y;                       // of the first column and row, before reflection
    int first_column, last_column;  // that some query sees
    bool words_aligned;             // NCHW: groups of four pixels to 8 bytes

    // The window of the tile of queries that begins at output pixel (tile_x, tile_y).
    __device__ __forceinline__ Window(const LocalAttention& problem, const Image<const __half, kLayout>& input,
                                      int head, int tile_x, int tile_y)
        : input(input),
          key_channel(static_cast<std::int64_t>(problem.num_heads + head) * problem.head_dim),
          value_channel(static_cast<std::int64_t>(2 * problem.num_heads + head) * problem.head_dim),
          head_dim(problem.head_dim),
          height(problem.height),
          width(problem.width),
          x(tile_x * problem.stride - kMargin),
          y(tile_y * problem.stride - problem.kernel_size / 2),
          first_column(kMargin - problem.kernel_size / 2),
          last_column(kMargin + (kTileWidth - 1) * problem.stride + problem.kernel_size / 2),
          words_aligned(width % 4 == 0 && reinterpret_cast<std::uintptr_t>(input.data) % 8 == 0) {}

    // Begin to load window rows [first, first + rows) into `buffer`. `fresh` clears what is never loaded: a weight of 0
    // hides every finite value, but no stray NaN.
    __device__ __forceinline__ void load(__half* buffer, const Buffer<kLayout, kHeadDim>& shape, int first, int rows,
                                         bool fresh) const {
        constexpr bool kNhwc = kLayout == Layout::kNhwc;
        constexpr int kChannels = kNhwc ? 8 : 1, kPixels = kNhwc ? 1 : 4;  // in a word
        constexpr int kPlanes = kHeadDim / kChannels;
        // Up to kSpan threads side by side take the words of a row, groups of them take turns with the rows.
        constexpr int kSpan = kNhwc && kHeadDim < 32 ? 4 * kHeadDim : 128;
        const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
        const int words = shape.columns / kPixels;
        const int row_pitch = kNhwc ? width * static_cast<int>(input.channels) : width;
        for (int word = thread % kSpan; word < words * 2 * kPlanes; word += min(threads, kSpan)) {
            const int plane = kNhwc ? word % (2 * kPlanes) : word / words;
            const int column = (kNhwc ? word / (2 * kPlanes) : word % words) * kPixels;
            const int part = plane / kPlanes, channel = plane % kPlanes * kChannels;
            const bool seen = channel < head_dim && column + kPixels > first_column && column <= last_column;
            const int left = x + column;
            const bool whole = kNhwc || (words_aligned && left >= 0 && left + kPixels <= width);
            const __half* from =
                input.at((part == 0 ? key_channel : value_channel) + channel, kNhwc ? reflect(left, width) : 0);
            __half* to = buffer + part * shape.part + shape.at(0, column, channel);
            const auto each_row = [&](auto&& bring) {
                for (int row = thread / kSpan; row < rows; row += max(threads / kSpan, 1)) {
                    const auto from_y = static_cast<std::int64_t>(reflect(y + first + row, height));
                    bring(to + shape.at(row, 0, 0), from + from_y * row_pitch);
                }
            };
            if (!seen) {
                using Word = std::conditional_t<kNhwc, uint4, uint2>;
                if (fresh) each_row([](__half* word, const __half*) { *reinterpret_cast<Word*>(word) = Word{}; });
            } else if constexpr (kNhwc) {
                each_row([](__half* word, const __half* from_row) { ptx::copy_async<16>(word, from_row); });
            } else if (whole) {
                each_row([&](__half* word, const __half* from_row) { ptx::copy_async<8>(word, from_row + left); });
            } else {
                each_row([&](__half* word, const __half* from_row) {
#pragma unroll
                    for (int i = 0; i < kPixels; ++i) word[i] = from_row[reflect(left + i, width)];
                });
            }
        }
    }
};

// Two neighbouring channels of a pixel as one register, `channel` even; 0 beyond the head.
template <Layout kLayout>
__device__ __forceinline__ std::uint32_t load_pair(const Image<const __half, kLayout>& input, std::int64_t channel,
                                                   std::int64_t pixel) {
    const __half* from = input.at(channel, pixel);
    if constexpr (kLayout == Layout::kNhwc) {
        return *reinterpret_cast<const std::uint32_t*>(from);
    } else {
        const auto low = *reinterpret_cast<const std::uint16_t*>(from);
        const auto high = *reinterpret_cast<const std::uint16_t*>(from + input.pixels);
        return low | static_cast<std::uint32_t>(high) << 16;
    }
}

// One block per tile of 8 x (2 * warps) queries of one head; heads of a tile follow each other, as they share pixels.
//
// Registers follow the fragments of mma.m16n8k16: of a 16x8 result a lane holds columns 2 * (lane % 4) and the next, of
// rows lane / 4 (elements 0, 1) and lane / 4 + 8 (elements 2, 3). Row r is query (r % 8, r / 8) of the warp's 8 x 2.
template <Layout kLayout, int kHeadDim, int kStride>
__global__ void local_attention_mma_kernel(LocalAttention problem, MmaPlan plan, const __half* __restrict__ qkv,
                                           const __half* __restrict__ position_weight, __half* __restrict__ y) {
    constexpr bool kNhwc = kLayout == Layout::kNhwc;
    constexpr int kSteps = kHeadDim / 16;
    constexpr int kColumnTiles = kStride + 1;
    const int height = problem.height, width = problem.width, head_dim = problem.head_dim;
    const int kernel_size = problem.kernel_size, margin = kernel_size / 2;
    const int out_height = height / kStride, out_width = width / kStride;
    const int head = static_cast<int>(blockIdx.x) % problem.num_heads;
    const int tile_x = static_cast<int>(blockIdx.x) / problem.num_heads * kTileWidth;
    const int tile_y = static_cast<int>(blockIdx.y) * kWarpRows * plan.warps;
    const auto image = static_cast<std::int64_t>(blockIdx.z);

    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int quad = lane / 4, pair = lane % 4 * 2;
    const std::int64_t channels = static_cast<std::int64_t>(problem.num_heads) * head_dim;
    const std::int64_t pixels = static_cast<std::int64_t>(height) * width;
    const std::int64_t query_channel = static_cast<std::int64_t>(head) * head_dim;
    const Image<const __half, kLayout> input{qkv + image * 3 * channels * pixels, 3 * channels, pixels};
    const Window<kLayout, kHeadDim> window(problem, input, head, tile_x, tile_y);
    const Buffer<kLayout, kHeadDim> shape(plan.rows, plan.columns);
    auto* const shared = reinterpret_cast<__half*>(ptx::dynamic_shared());
    const int window_rows = (kWarpRows * plan.warps - 1) * kStride + kernel_size;
    const auto load_stage = [&](int stage) {
        const int first = stage * plan.rows;
        window.load(shared + stage % plan.buffers * shape.halves(), shape, first, min(plan.rows, window_rows - first),
                    stage < plan.buffers);
        ptx::commit_copies();
    };
    load_stage(0);

    // Queries, and q.P beside them, as an mma with P for its first two columns. The sign of the scale goes into q.
    const int out_x = tile_x + quad, out_y = tile_y + warp * kWarpRows;
    std::uint32_t query[kSteps][4];
    float position[4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        std::uint32_t weight[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int channel = step * 16 + half * 8 + pair;
            const bool inside = channel < head_dim;
#pragma unroll
            for (int row = 0; row < kWarpRows; ++row) {
                const std::int64_t from_y = static_cast<std::int64_t>(min(out_y + row, out_height - 1)) * kStride;
                const std::int64_t pixel = from_y * width + min(out_x, out_width - 1) * kStride;
                query[step][half * 2 + row] = inside ? load_pair(input, query_channel + channel, pixel) ^ plan.sign : 0;
            }
            if (position_weight != nullptr && inside && quad < 2) {
                const auto* from = reinterpret_cast<const std::uint16_t*>(position_weight) + channel * 2 + quad;
                weight[half] = from[0] | static_cast<std::uint32_t>(from[2]) << 16;
            }
        }
        ptx::mma_k16(position, query[step], weight, position);
    }
    float along_x[kWarpRows], along_y[kWarpRows];
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
        along_x[row] = __shfl_sync(~0u, position[row * 2], quad * 4);
        along_y[row] = __shfl_sync(~0u, position[row * 2 + 1], quad * 4);
    }

    // What every row of keys adds to its logits: the position along x, and -inf outside the window.
    float column_term[kColumnTiles][4];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = tile * 8 + pair + i % 2;
            const bool seen = abs(column - kMargin - quad * kStride) <= margin;
            const float x = plan.x(reflect(window.x + column, width));
            column_term[tile][i] = seen ? -along_x[i / 2] * x : -INFINITY;
        }
    }

    // Where the matrix rows stand that this lane names to load_matrices, a matrix being 8 columns by 8 channels. Of
    // four matrices it names a row of number lane / 8. `third` is the third tile of columns, where the stride is 2.
    const int matrix = lane / 8, line = lane % 8;
    const auto row_of = [&](int column_tile, int channel_tile) {
        return kNhwc ? shape.at(0, column_tile * 8 + line, channel_tile * 8)
                     : shape.at(0, column_tile * 8, channel_tile * 8 + line);
    };
    const int to_key = row_of(matrix / 2, matrix % 2), to_third_key = row_of(2, matrix % 2);
    const int to_value = shape.part + row_of(matrix % 2, matrix / 2), to_third_value = shape.part + to_third_key;
    const int next_step = shape.at(0, 0, 16);

    float maximum[kWarpRows] = {kNoMaximum, kNoMaximum};
    float attended[kSteps * 2][4] = {};
    float sum[4] = {};  // the product with a matrix of ones: 8 equal columns, of which the first is kept
    const std::uint32_t ones[2] = {0x3c003c00u, 0x3c003c00u};

    for (int stage = 0; stage < plan.stages; ++stage) {
        if (stage + 1 < plan.stages) {
            load_stage(stage + 1);
            ptx::wait_for_copies<1>();
        } else {
            ptx::wait_for_copies<0>();
        }
        __syncthreads();
        // Window row r is row r - above of this warp's own window of kStride + kernel_size rows.
        const int above = warp * kWarpRows * kStride - stage * plan.rows;
        const int first = max(above, 0), last = min(above + kStride + kernel_size, plan.rows);
        const __half* keys = shared + stage % plan.buffers * shape.halves() + shape.at(first, 0, 0);
        for (int row = first; row < last && out_y < out_height; ++row, keys += shape.at(1, 0, 0)) {
            float logits[kColumnTiles][4];
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                std::uint32_t key[4];
                ptx::load_matrices<!kNhwc>(key, keys + to_key + step * next_step);
                ptx::mma_k16(logits[0], query[step], {key[0], key[1]}, step == 0 ? column_term[0] : logits[0]);
                ptx::mma_k16(logits[1], query[step], {key[2], key[3]}, step == 0 ? column_term[1] : logits[1]);
                if constexpr (kColumnTiles == 3) {
                    std::uint32_t third[2];
                    ptx::load_matrices<!kNhwc>(third, keys + to_third_key + step * next_step);
                    ptx::mma_k16(logits[2], query[step], third, step == 0 ? column_term[2] : logits[2]);
                }
            }

            // The position along y is the same for all of a query's logits here: it joins them in the exponent.
            const float key_y = plan.y(reflect(window.y + stage * plan.rows + row, height));
            float row_term[kWarpRows], portion[kWarpRows];
#pragma unroll
            for (int i = 0; i < kWarpRows; ++i) {
                const auto own_row = static_cast<unsigned>(row - above - i * kStride);
                row_term[i] = own_row < static_cast<unsigned>(kernel_size) ? -along_y[i] * key_y : -INFINITY;
                portion[i] = logits[0][i * 2];
#pragma unroll
                for (int tile = 0; tile < kColumnTiles; ++tile) {
                    portion[i] = fmaxf(portion[i], fmaxf(logits[tile][i * 2], logits[tile][i * 2 + 1]));
                }
                portion[i] += row_term[i];
            }
            if (__any_sync(~0u, portion[0] > maximum[0] + plan.slack || portion[1] > maximum[1] + plan.slack)) {
#pragma unroll
                for (int i = 0; i < kWarpRows; ++i) {
                    portion[i] = fmaxf(portion[i], __shfl_xor_sync(~0u, portion[i], 1));
                    portion[i] = fmaxf(portion[i], __shfl_xor_sync(~0u, portion[i], 2));
                    const float raised = fmaxf(maximum[i], portion[i]);
                    const float rescale = ptx::exp2((maximum[i] - raised) * plan.scale);
                    maximum[i] = raised;
                    sum[i * 2] *= rescale;
#pragma unroll
                    for (int tile = 0; tile < kSteps * 2; ++tile) {
                        attended[tile][i * 2] *= rescale;
                        attended[tile][i * 2 + 1] *= rescale;
                    }
                }
            }

            std::uint32_t weight[kColumnTiles][kWarpRows];
#pragma unroll
            for (int i = 0; i < kWarpRows; ++i) {
                const float shift = (row_term[i] - maximum[i]) * plan.scale;
#pragma unroll
                for (int tile = 0; tile < kColumnTiles; ++tile) {
                    weight[tile][i] = ptx::pack_half2(ptx::exp2(fmaf(logits[tile][i * 2], plan.scale, shift)),
                                                      ptx::exp2(fmaf(logits[tile][i * 2 + 1], plan.scale, shift)));
                }
            }
            const std::uint32_t weights[4] = {weight[0][0], weight[0][1], weight[1][0], weight[1][1]};
            ptx::mma_k16(sum, weights, ones, sum);
            if constexpr (kColumnTiles == 3) ptx::mma_k8(sum, weight[2], ones[0], sum);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                float (&low)[4] = attended[step * 2], (&high)[4] = attended[step * 2 + 1];
                std::uint32_t value[4];
                ptx::load_matrices<kNhwc>(value, keys + to_value + step * next_step);
                ptx::mma_k16(low, weights, {value[0], value[1]}, low);
                ptx::mma_k16(high, weights, {value[2], value[3]}, high);
                if constexpr (kColumnTiles == 3) {
                    std::uint32_t third[2];
                    ptx::load_matrices<kNhwc>(third, keys + to_third_value + step * next_step);
                    ptx::mma_k8(low, weight[2], third[0], low);
                    ptx::mma_k8(high, weight[2], third[1], high);
                }
            }
        }
        if (stage + 2 < plan.stages) __syncthreads();  // the next round loads into this buffer
    }

    const std::int64_t out_pixels = static_cast<std::int64_t>(out_height) * out_width;
    const Image<__half, kLayout> output{y + image * channels * out_pixels, channels, out_pixels};
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
        if (out_x >= out_width || out_y + i >= out_height) continue;
        const float factor = 1.0f / sum[i * 2];
        __half* to = output.at(query_channel + pair, static_cast<std::int64_t>(out_y + i) * out_width + out_x);
#pragma unroll
        for (int tile = 0; tile < kSteps * 2; ++tile) {
            if (tile * 8 >= head_dim) break;
            const float low = attended[tile][i * 2] * factor, high = attended[tile][i * 2 + 1] * factor;
            if constexpr (kNhwc) {
                *reinterpret_cast<std::uint32_t*>(to + tile * 8) = ptx::pack_half2(low, high);
            } else {
                store(to + tile * 8 * out_pixels, low);
                store(to + (tile * 8 + 1) * out_pixels, high);
            }
        }
    }
}

// A block's warps, and stages that fit shared memory without asking for more than every device gives.
template <Layout kLayout, int kHeadDim>
MmaPlan make_plan(const LocalAttention& problem) {
    constexpr int kSharedBytes = 48 * 1024;
    const int out_height = problem.height / problem.stride, columns = kTileWidth * (problem.stride + 1);
    const int warps = out_height > 2 * kWarpRows ? 4 : out_height > kWarpRows ? 2 : 1;
    const int window_rows = (kWarpRows * warps - 1) * problem.stride + problem.kernel_size;
    const auto fits = [&](int rows, int buffers) {
        return Buffer<kLayout, kHeadDim>(rows, columns).halves() * buffers * sizeof(__half) <= kSharedBytes;
    };
    int rows = window_rows, stages = 1;
    if (!fits(rows, 1)) {
        while (!fits(rows, 2)) --rows;
        stages = ceil_div(window_rows, rows);
        rows = ceil_div(window_rows, stages);
    }
    // FLT_MIN keeps a scale of 0 away from 0 * inf.
    const float scale = std::max(std::fabs(problem.scale) * kLog2E, FLT_MIN);
    const std::uint32_t sign = problem.scale < 0 ? 0x80008000u : 0u;
    return {warps,
            stages,
            rows,
            columns,
            std::min(stages, 2),
            scale,
            kSlack / scale,
            sign,
            Coordinate(problem.width),
            Coordinate(problem.height)};
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t local_attention_mma(const LocalAttention& problem, const void* const* inputs, void* y,
                                cudaStream_t stream) {
    static_assert(kDtype == Dtype::kFloat16, "tensor cores take halves here");
    const void *const qkv = inputs[0], *const position_weight = inputs[1];  // the latter null for none
    if (kLayout == Layout::kNhwc && !(aligned(qkv, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    const MmaPlan plan = make_plan<kLayout, kHeadDim>(problem);
    const int tiles_x = ceil_div(problem.width / problem.stride, kTileWidth);
    const int tiles_y = ceil_div(problem.height / problem.stride, kWarpRows * plan.warps);
    const auto kernel = problem.stride == 1 ? local_attention_mma_kernel<kLayout, kHeadDim, 1>
                                            : local_attention_mma_kernel<kLayout, kHeadDim, 2>;
    return ptx::launch(kernel, dim3(problem.num_heads * tiles_x, tiles_y, problem.batch), dim3(plan.warps * 32),
                       Buffer<kLayout, kHeadDim>(plan.rows, plan.columns).halves() * plan.buffers * sizeof(__half),
                       stream, problem, plan, static_cast<const __half*>(qkv),
                       static_cast<const __half*>(position_weight), static_cast<__half*>(y));
}

}  // namespace acmix
