// What a framework binding needs of the kernels: one lookup in the dispatch tables and one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <string>

#include "acmix/operators.h"

namespace acmix {

// One row of a dispatch table. `head_dim` is the padded one: a problem takes the smallest row that holds it; it is 0
// where the operator has none. Tensors have the problem's `dtype` and, where four-dimensional, its `layout`.
template <class Problem>
struct Entry {
    Dtype dtype;
    Layout layout;
    std::int32_t head_dim;
    Kernel kernel;
    std::int32_t min_sm;  // 75 for sm_75
    cudaError_t (*launch)(const Problem&, const void* const* inputs, void* y, cudaStream_t);
};

// In the order in which find() takes them: among the rows of a kernel, the smallest head_dim first.
template <class Problem>
Span<Entry<Problem>> table();

template <class Problem>
struct Found {
    const Entry<Problem>* entry;  // null: unsupported
    std::string reason;           // "unsupported: got ..., supported ..." where entry is null
};

inline constexpr std::int32_t kAnySm = std::numeric_limits<std::int32_t>::max();

// The first entry for a problem on a device of compute capability `sm`, tensor cores before scalar arithmetic, and of
// `wanted` alone where it is given. Calls nothing of CUDA, so that it serves format negotiation on a machine without a
// GPU too. Sizes below 1 mean "not known yet" and are not checked. Allocates nothing where it finds an entry.
template <class Problem>
Found<Problem> find(const Problem&, std::int32_t sm = kAnySm, const Kernel* wanted = nullptr);

// Runs a problem on the current device, on the stream alone. Returns an empty string when the launch was accepted, also
// for a batch of 0, else one sentence; allocates nothing when it was. Inputs hold finite numbers: what is not finite
// may spoil up to 10 outputs beyond those whose windows see it.
template <class Problem>
std::string launch(const Problem&, const void* const* inputs, void* y, cudaStream_t, const Kernel* wanted = nullptr);

const char* name(Dtype);
const char* name(Layout);
const char* name(Kernel);

// The first digits of a digest of the kernels' sources; "development" where they were compiled without CMake.
const char* sources();

}  // namespace acmix
