// Every row of the dispatch tables at small sizes, for compute-sanitizer. Allocations are exact, so that it sees an
// access beyond them.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "acmix/operators.h"
#include "dispatch.h"

namespace {

using namespace acmix;

void require(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
}

// `count` elements, none of them special in either dtype.
class Tensor {
 public:
    Tensor(Dtype dtype, std::size_t count) {
        const std::size_t bytes = count * (dtype == Dtype::kFloat16 ? 2 : 4);
        std::vector<unsigned char> pattern(bytes);
        for (std::size_t i = 0; i < bytes; ++i) pattern[i] = static_cast<unsigned char>(32 + i * 7 % 29);
        require(cudaMalloc(&data_, bytes), "cudaMalloc");
        require(cudaMemcpy(data_, pattern.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() { cudaFree(data_); }
    void* data() const { return data_; }

 private:
    void* data_ = nullptr;
};

struct Sizes {
    std::size_t first, second, y;
};

Sizes sizes(const LocalAttention& p) {
    const std::size_t y = static_cast<std::size_t>(p.batch) * p.num_heads * p.head_dim * p.height * p.width;
    return {3 * y, static_cast<std::size_t>(2 * p.head_dim), y / p.stride / p.stride};
}

Sizes sizes(const OutlookAttention& p) {
    const int places = p.kernel_size * p.kernel_size;
    const std::size_t y = static_cast<std::size_t>(p.batch) * p.num_heads * p.head_dim * p.height * p.width;
    const int windows = ((p.height + p.stride - 1) / p.stride) * ((p.width + p.stride - 1) / p.stride);
    const int weights = p.num_heads * places * places;
    const int channels = p.layout == Layout::kNhwc ? (weights + 7) / 8 * 8 : weights;
    return {static_cast<std::size_t>(p.batch) * channels * windows, y, y};
}

template <class Problem, std::size_t kCount>
int run_table(const std::int32_t (&kernel_sizes)[kCount]) {
    int launches = 0;
    for (const Entry<Problem>& entry : table<Problem>()) {
        for (const std::int32_t kernel_size : kernel_sizes) {
            for (const std::int32_t stride : {1, 2}) {
                for (const std::int32_t head_dim : {entry.head_dim - 8, entry.head_dim}) {
                    for (const std::int32_t width : {10, 12}) {
                        const int batch = 2, heads = 1, height = 10;
                        const Problem p{entry.dtype, entry.layout, batch,       heads,  head_dim,
                                        height,      width,        kernel_size, stride, 0.1f};
                        const Sizes count = sizes(p);
                        const Tensor first(p.dtype, count.first), second(p.dtype, count.second), y(p.dtype, count.y);
                        require(entry.launch(p, first.data(), second.data(), y.data(), nullptr), "launch");
                        require(cudaDeviceSynchronize(), "kernel");
                        ++launches;
                    }
                }
            }
        }
    }
    return launches;
}

}  // namespace

int main() {
    const int local = run_table<LocalAttention>(local_attention::kKernelSizes);
    const int outlook = run_table<OutlookAttention>(outlook_attention::kKernelSizes);
    std::printf("%d launches of local attention, %d of outlook attention\n", local, outlook);
}
