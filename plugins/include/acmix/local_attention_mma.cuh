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

#include "acmix/ptx.cuh"
#include "acmix/softmax.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

inline constexpr int kTileWidth = 8;  // queries of a warp along x: the lanes of a quad share one
inline constexpr int kWarpRows = 2;   // queries of a warp along y: the two halves of the 16 rows of an mma
inline constexpr int kMaxWarps = 4;   // warps of a block, one below the other
inline constexpr int kMargin = 4;     // columns left of the first query, the largest kernel_size / 2

// How a block's window of keys and values goes through shared memory.
struct Stages {
    int warps;
    int count;    // stages
    int rows;     // of keys in a stage
    int columns;  // of keys
    int buffers;
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
    bool words;                     // NCHW: groups of four pixels are aligned to 8 bytes

    // Begin to load window rows [first, first + rows) into `buffer`. `fresh` clears what is never loaded: a weight of 0
    // hides every finite value, but no stray NaN.
    __device__ __forceinline__ void load(__half* buffer, const Buffer<kLayout, kHeadDim>& shape, int first, int rows,
                                         bool fresh) const {
        const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
        for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += warps) {
            const std::int64_t from_row = static_cast<std::int64_t>(reflect(y + first + row, height)) * width;
            if constexpr (kLayout == Layout::kNhwc) {
                constexpr int kWords = kHeadDim / 8;
                for (int i = lane; i < shape.columns * 2 * kWords; i += 32) {
                    const int channel = i % kWords * 8, part = i / kWords % 2, column = i / kWords / 2;
                    __half* to = buffer + part * shape.part + shape.at(row, column, channel);
                    if (channel < head_dim && column >= first_column && column <= last_column) {
                        const std::int64_t pixel = from_row + reflect(x + column, width);
                        ptx::copy_async<16>(to, input.at((part == 0 ? key_channel : value_channel) + channel, pixel));
                    } else if (fresh) {
                        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
                    }
                }
            } else {
                const int words = shape.columns / 4;
                for (int i = lane; i < words * 2 * kHeadDim; i += 32) {
                    const int plane = words == 4 ? i / 4 : i / 6, column = (words == 4 ? i % 4 : i % 6) * 4;
                    const int channel = plane % kHeadDim, part = plane / kHeadDim;
                    __half* to = buffer + part * shape.part + shape.at(row, column, channel);
                    if (channel < head_dim) {
                        const __half* from = input.at((part == 0 ? key_channel : value_channel) + channel, from_row);
                        const int left = x + column;
                        if (words_at(left)) {
                            ptx::copy_async<8>(to, from + left);
                        } else {
#pragma unroll
                            for (int j = 0; j < 4; ++j) to[j] = from[reflect(left + j, width)];
                        }
                    } else if (fresh) {
                        *reinterpret_cast<uint2*>(to) = uint2{0, 0};
                    }
                }
            }
        }
    }

 private:
    __device__ __forceinline__ bool words_at(int left) const { return words && left >= 0 && left + 4 <= width; }
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
__global__ void local_attention_mma_kernel(LocalAttention problem, Stages stages, const __half* __restrict__ qkv,
                                           const __half* __restrict__ position_weight, __half* __restrict__ y) {
    constexpr bool kNhwc = kLayout == Layout::kNhwc;
    constexpr int kSteps = kHeadDim / 16;
    constexpr int kColumnTiles = kStride + 1;
    const int height = problem.height, width = problem.width, head_dim = problem.head_dim;
    const int kernel_size = problem.kernel_size, margin = kernel_size / 2;
    const int out_height = height / kStride, out_width = width / kStride;
    const int tiles_x = ceil_div(out_width, kTileWidth), tiles_y = ceil_div(out_height, kWarpRows * stages.warps);
    int block = static_cast<int>(blockIdx.x);
    const int head = block % problem.num_heads;
    block /= problem.num_heads;
    const int tile_x = block % tiles_x * kTileWidth;
    block /= tiles_x;
    const int tile_y = block % tiles_y * kWarpRows * stages.warps;
    const int image = block / tiles_y;

    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int quad = lane / 4, pair = lane % 4 * 2;
    const std::int64_t channels = static_cast<std::int64_t>(problem.num_heads) * head_dim;
    const std::int64_t pixels = static_cast<std::int64_t>(height) * width;
    const std::int64_t query_channel = static_cast<std::int64_t>(head) * head_dim;
    const Image<const __half, kLayout> input{qkv + image * 3 * channels * pixels, 3 * channels, pixels};
    const Window<kLayout, kHeadDim> window{input,
                                           query_channel + channels,
                                           query_channel + 2 * channels,
                                           head_dim,
                                           height,
                                           width,
                                           tile_x * kStride - kMargin,
                                           tile_y * kStride - margin,
                                           kMargin - margin,
                                           kMargin + (kTileWidth - 1) * kStride + margin,
                                           width % 4 == 0 && reinterpret_cast<std::uintptr_t>(qkv) % 8 == 0};
    const Buffer<kLayout, kHeadDim> shape(stages.rows, stages.columns);
    auto* const shared = reinterpret_cast<__half*>(ptx::dynamic_shared());
    const int window_rows = (kWarpRows * stages.warps - 1) * kStride + kernel_size;
    const auto load_stage = [&](int stage) {
        const int first = stage * stages.rows;
        window.load(shared + stage % stages.buffers * shape.halves(), shape, first,
                    min(stages.rows, window_rows - first), stage < stages.buffers);
        ptx::commit_copies();
    };
    load_stage(0);

    // Queries, and q.P beside them, as an mma with P for its first two columns. The sign of the scale goes into q.
    const int out_x = tile_x + quad, out_y = tile_y + warp * kWarpRows;
    const std::uint32_t sign = problem.scale < 0 ? 0x80008000u : 0u;
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
                query[step][half * 2 + row] = inside ? load_pair(input, query_channel + channel, pixel) ^ sign : 0;
            }
            if (position_weight != nullptr && inside && quad < 2) {
                const auto* from = reinterpret_cast<const std::uint16_t*>(position_weight) + channel * 2 + quad;
                weight[half] = from[0] | static_cast<std::uint32_t>(from[2]) << 16;
            }
        }
        ptx::mma_k16(position, query[step], weight);
    }
    float along_x[kWarpRows], along_y[kWarpRows];
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
        along_x[row] = __shfl_sync(~0u, position[row * 2], quad * 4);
        along_y[row] = __shfl_sync(~0u, position[row * 2 + 1], quad * 4);
    }

    // What every row of keys adds to the logits: the position along x, and -inf outside the window.
    const Coordinate coordinate_x(width), coordinate_y(height);
    float column_term[kColumnTiles][4];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = tile * 8 + pair + i % 2;
            const bool seen = abs(column - kMargin - quad * kStride) <= margin;
            const float x = coordinate_x(reflect(window.x + column, width));
            column_term[tile][i] = seen ? -along_x[i / 2] * x : -INFINITY;
        }
    }

    // Where this lane's matrix row stands for load_matrices: of keys, the logits' k axis is the channel; of values it
    // is the column. `first` serves the column tiles 0 and 1, `third` tile 2.
    const int matrix = lane / 8, line = lane % 8;
    const int to_key =
        kNhwc ? shape.at(0, matrix / 2 * 8 + line, matrix % 2 * 8) : shape.at(0, matrix / 2 * 8, matrix % 2 * 8 + line);
    const int to_third_key = kNhwc ? shape.at(0, 16 + line, matrix % 2 * 8) : shape.at(0, 16, matrix % 2 * 8 + line);
    const int to_value = shape.part + (kNhwc ? shape.at(0, matrix % 2 * 8 + line, matrix / 2 * 8)
                                             : shape.at(0, matrix % 2 * 8, matrix / 2 * 8 + line));
    const int to_third_value = shape.part + to_third_key;
    const int next_step = shape.at(0, 0, 16);

    // Logits are compared in units of 1 / (scale * log2(e)); FLT_MIN keeps a scale of 0 away from 0 * inf.
    const float scale = fmaxf(fabsf(problem.scale) * kLog2E, FLT_MIN);
    const float slack = kSlack / scale;
    float maximum[kWarpRows] = {kNoMaximum, kNoMaximum}, sum[kWarpRows] = {};
    float attended[kSteps * 2][4] = {};

    for (int stage = 0; stage < stages.count; ++stage) {
        if (stage + 1 < stages.count) {
            load_stage(stage + 1);
            ptx::wait_for_copies<1>();
        } else {
            ptx::wait_for_copies<0>();
        }
        __syncthreads();
        const __half* buffer = shared + stage % stages.buffers * shape.halves();
        // Window row r is row r - above of this warp's own window of kStride + kernel_size rows.
        const int above = warp * kWarpRows * kStride;
        const int first = max(above - stage * stages.rows, 0);
        const int last = min(above + kStride + kernel_size - stage * stages.rows, stages.rows);
        for (int row = first; row < last && out_y < out_height; ++row) {
            const int own_row = stage * stages.rows + row - above;
            const float key_y = coordinate_y(reflect(window.y + stage * stages.rows + row, height));
            float logits[kColumnTiles][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int offset = own_row - i / 2 * kStride;
                const float row_term = offset >= 0 && offset < kernel_size ? -along_y[i / 2] * key_y : -INFINITY;
#pragma unroll
                for (int tile = 0; tile < kColumnTiles; ++tile) logits[tile][i] = column_term[tile][i] + row_term;
            }

            const __half* keys = buffer + shape.at(row, 0, 0);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                std::uint32_t key[4];
                ptx::load_matrices<!kNhwc>(key, keys + to_key + step * next_step);
                ptx::mma_k16(logits[0], query[step], {key[0], key[1]});
                ptx::mma_k16(logits[1], query[step], {key[2], key[3]});
                if constexpr (kColumnTiles == 3) {
                    std::uint32_t third[2];
                    ptx::load_matrices<!kNhwc>(third, keys + to_third_key + step * next_step);
                    ptx::mma_k16(logits[2], query[step], third);
                }
            }

            // The sums are rescaled only when a logit outgrows the maximum in use by more than kSlack: weights up to
            // 2^kSlack are as exact in half as weights up to 1, and most rows need no exchange between lanes.
            float portion[kWarpRows];
#pragma unroll
            for (int i = 0; i < kWarpRows; ++i) {
                portion[i] =
                    fmaxf(fmaxf(logits[0][i * 2], logits[0][i * 2 + 1]), fmaxf(logits[1][i * 2], logits[1][i * 2 + 1]));
                if constexpr (kColumnTiles == 3) {
                    portion[i] = fmaxf(portion[i], fmaxf(logits[2][i * 2], logits[2][i * 2 + 1]));
                }
            }
            if (__any_sync(~0u, portion[0] > maximum[0] + slack || portion[1] > maximum[1] + slack)) {
#pragma unroll
                for (int i = 0; i < kWarpRows; ++i) {
                    portion[i] = fmaxf(portion[i], __shfl_xor_sync(~0u, portion[i], 1));
                    portion[i] = fmaxf(portion[i], __shfl_xor_sync(~0u, portion[i], 2));
                    const float raised = fmaxf(maximum[i], portion[i]);
                    const float rescale = ptx::exp2((maximum[i] - raised) * scale);
                    maximum[i] = raised;
                    sum[i] *= rescale;
#pragma unroll
                    for (int tile = 0; tile < kSteps * 2; ++tile) {
                        attended[tile][i * 2] *= rescale;
                        attended[tile][i * 2 + 1] *= rescale;
                    }
                }
            }

            std::uint32_t weight[kColumnTiles][kWarpRows];
#pragma unroll
            for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < kWarpRows; ++i) {
                    const float low = ptx::exp2((logits[tile][i * 2] - maximum[i]) * scale);
                    const float high = ptx::exp2((logits[tile][i * 2 + 1] - maximum[i]) * scale);
                    sum[i] += low + high;
                    weight[tile][i] = ptx::pack_half2(low, high);
                }
            }
            const std::uint32_t weights[4] = {weight[0][0], weight[0][1], weight[1][0], weight[1][1]};
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                std::uint32_t value[4];
                ptx::load_matrices<kNhwc>(value, keys + to_value + step * next_step);
                ptx::mma_k16(attended[step * 2], weights, {value[0], value[1]});
                ptx::mma_k16(attended[step * 2 + 1], weights, {value[2], value[3]});
                if constexpr (kColumnTiles == 3) {
                    std::uint32_t third[2];
                    ptx::load_matrices<kNhwc>(third, keys + to_third_value + step * next_step);
                    ptx::mma_k8(attended[step * 2], weight[2], third[0]);
                    ptx::mma_k8(attended[step * 2 + 1], weight[2], third[1]);
                }
            }
        }
        if (stage + 2 < stages.count) __syncthreads();  // the next round loads into this buffer
    }

#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
        sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
        if (out_x >= out_width || out_y + i >= out_height) continue;
        const float factor = 1.0f / sum[i];
        const std::int64_t out_pixels = static_cast<std::int64_t>(out_height) * out_width;
        const Image<__half, kLayout> output{y + image * channels * out_pixels, channels, out_pixels};
        const std::int64_t pixel = static_cast<std::int64_t>(out_y + i) * out_width + out_x;
#pragma unroll
        for (int tile = 0; tile < kSteps * 2; ++tile) {
            const int channel = tile * 8 + pair;
            if (channel >= head_dim) break;
            const float low = attended[tile][i * 2] * factor, high = attended[tile][i * 2 + 1] * factor;
            __half* to = output.at(query_channel + channel, pixel);
            if constexpr (kNhwc) {
                *reinterpret_cast<std::uint32_t*>(to) = ptx::pack_half2(low, high);
            } else {
                store(to, low);
                store(to + out_pixels, high);
            }
        }
    }
}

// A block's warps, and stages that fit shared memory without asking for more than every device gives.
template <Layout kLayout, int kHeadDim>
Stages plan_stages(const LocalAttention& problem) {
    constexpr int kSharedBytes = 48 * 1024;
    const int columns = kTileWidth * (problem.stride + 1);
    const int warps = std::min(kMaxWarps, ceil_div(problem.height / problem.stride, kWarpRows));
    const int window_rows = (kWarpRows * warps - 1) * problem.stride + problem.kernel_size;
    const auto fits = [&](int rows, int buffers) {
        const auto bytes = Buffer<kLayout, kHeadDim>(rows, columns).halves() * sizeof(__half);
        return bytes * buffers <= kSharedBytes;
    };
    if (fits(window_rows, 1)) return {warps, 1, window_rows, columns, 1};
    int rows = window_rows;
    while (!fits(rows, 2)) --rows;
    const int count = ceil_div(window_rows, rows);
    return {warps, count, ceil_div(window_rows, count), columns, 2};
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t local_attention_mma(const LocalAttention& problem, const void* qkv, const void* position_weight, void* y,
                                cudaStream_t stream) {
    static_assert(kDtype == Dtype::kFloat16, "tensor cores take halves here");
    if (kLayout == Layout::kNhwc && !(aligned(qkv, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    const Stages stages = plan_stages<kLayout, kHeadDim>(problem);
    const int tiles_x = ceil_div(problem.width / problem.stride, kTileWidth);
    const int tiles_y = ceil_div(problem.height / problem.stride, kWarpRows * stages.warps);
    const int blocks = tiles_x * tiles_y * problem.num_heads * problem.batch;
    const auto shared = Buffer<kLayout, kHeadDim>(stages.rows, stages.columns).halves() * sizeof(__half);
    const auto kernel = problem.stride == 1 ? local_attention_mma_kernel<kLayout, kHeadDim, 1>
                                            : local_attention_mma_kernel<kLayout, kHeadDim, 2>;
    return ptx::launch(kernel, dim3(blocks), dim3(stages.warps * 32), shared * stages.buffers, stream, problem, stages,
                       static_cast<const __half*>(qkv), static_cast<const __half*>(position_weight),
                       static_cast<__half*>(y));
}

}  // namespace acmix
