// Every row of the dispatch tables at small sizes, for compute-sanitizer. Allocations are exact, so that it sees an
// access beyond them.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <vector>

#include "acmix/launch.h"

namespace {

using namespace acmix;

void require(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
}

// The elements of a tensor, none of them special in either dtype.
class Memory {
 public:
    template <class Problem>
    Memory(const Problem& problem, const Tensor<Problem>& tensor) {
        std::size_t bytes = problem.dtype == Dtype::kFloat16 ? 2 : 4;
        for (const Axis<Problem>& axis : tensor.axes) {
            const bool padded =
                problem.layout == Layout::kNhwc && tensor.axes.size == 4 && &axis == tensor.axes.begin() + 1;
            const auto size = static_cast<std::size_t>(length(axis, problem));
            bytes *= padded ? (size + 7) / 8 * 8 : size;
        }
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

// visit(problem) for all that kernels take beside heads: each kernel size with each stride, border and so on.
template <class Problem, class Visit>
void for_each_window(Problem problem, const Size<Problem>* size, const Visit& visit) {
    if (size == std::end(Definition<Problem>::kSizes)) return visit(problem);
    if (size->choices.size == 0 || size->at == &Problem::head_dim) return for_each_window(problem, size + 1, visit);
    for (const std::int32_t choice : size->choices) {
        problem.*size->at = choice;
        for_each_window(problem, size + 1, visit);
    }
}

template <class Problem>
void run_table() {
    using Operator = Definition<Problem>;
    int launches = 0;
    for (const Entry<Problem>& entry : table<Problem>()) {
        Problem each{entry.dtype, entry.layout};
        for (const Size<Problem>& size : Operator::kSizes) each.*size.at = 1;
        each.batch = 2;
        each.height = 10;
        each.scale = 0.1f;
        for_each_window(each, Operator::kSizes, [&](Problem problem) {
            for (const std::int32_t head_dim : {entry.head_dim - 8, entry.head_dim}) {
                for (const std::int32_t width : {10, 12}) {
                    problem.head_dim = head_dim;
                    problem.width = width;
                    std::deque<Memory> tensors;
                    std::vector<const void*> inputs;
                    for (const Tensor<Problem>& tensor : Operator::kInputs) {
                        inputs.push_back(tensors.emplace_back(problem, tensor).data());
                    }
                    const Memory y(problem, Operator::kOutputs[0]);
                    require(entry.launch(problem, inputs.data(), y.data(), nullptr), "launch");
                    require(cudaDeviceSynchronize(), "kernel");
                    ++launches;
                }
            }
        });
    }
    std::printf("%s: %d launches\n", Operator::kOpType, launches);
}

template <class... Problems>
void run_tables(List<Problems...>) {
    (run_table<Problems>(), ...);
}

}  // namespace

int main() { run_tables(Operators{}); }
