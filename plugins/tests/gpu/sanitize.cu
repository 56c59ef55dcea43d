// Every row of the dispatch tables at small sizes, for compute-sanitizer. Allocations are exact, so that it sees an
// access beyond them.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "acmix/launch.h"

namespace {

using namespace acmix;

void require(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
}

// `count` elements, none of them special in either dtype.
class Memory {
 public:
    Memory(Dtype dtype, std::size_t count) {
        const std::size_t bytes = count * (dtype == Dtype::kFloat16 ? 2 : 4);
        std::vector<unsigned char> pattern(bytes);
        for (std::size_t i = 0; i < bytes; ++i) pattern[i] = static_cast<unsigned char>(32 + i * 7 % 29);
        require(cudaMalloc(&data_, bytes), "cudaMalloc");
        require(cudaMemcpy(data_, pattern.data(), bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Memory(const Memory&) = delete;
    ~Memory() { cudaFree(data_); }
    void* data() const { return data_; }

 private:
    void* data_ = nullptr;
};

template <class Problem>
Memory memory(const Tensor<Problem>& tensor, const Problem& problem) {
    std::size_t count = 1;
    for (const Axis<Problem>& axis : tensor.axes) {
        const bool padded =
            problem.layout == Layout::kNhwc && tensor.axes.size == 4 && &axis == tensor.axes.begin() + 1;
        const auto size = static_cast<std::size_t>(length(axis, problem));
        count *= padded ? (size + 7) / 8 * 8 : size;
    }
    return Memory(problem.dtype, count);
}

template <class Problem>
void run_table() {
    using Operator = Definition<Problem>;
    int launches = 0;
    for (const Entry<Problem>& entry : table<Problem>()) {
        for (const std::int32_t kernel_size : Operator::kKernelSizes) {
            for (const std::int32_t stride : Operator::kStrides) {
                for (const std::int32_t head_dim : {entry.head_dim - 8, entry.head_dim}) {
                    for (const std::int32_t width : {10, 12}) {
                        Problem problem{entry.dtype, entry.layout};
                        problem.batch = 2;
                        problem.num_heads = 1;
                        problem.head_dim = head_dim;
                        problem.height = 10;
                        problem.width = width;
                        problem.kernel_size = kernel_size;
                        problem.stride = stride;
                        problem.scale = 0.1f;
                        const Memory first = memory(Operator::kInputs[0], problem);
                        const Memory second = memory(Operator::kInputs[1], problem);
                        const Memory y = memory(Operator::kOutputs[0], problem);
                        const void* const inputs[] = {first.data(), second.data()};
                        require(entry.launch(problem, inputs, y.data(), nullptr), "launch");
                        require(cudaDeviceSynchronize(), "kernel");
                        ++launches;
                    }
                }
            }
        }
    }
    std::printf("%s: %d launches\n", Operator::kOpType, launches);
}

template <class... Problems>
void run_tables(List<Problems...>) {
    (run_table<Problems>(), ...);
}

}  // namespace

int main() { run_tables(Operators{}); }
