// A tiny CUDA for tests. The threads of a block are fibers on one CPU thread, and a seeded random order decides which
// of them goes on after every barrier and warp-wide instruction, so that a forgotten one shows as a wrong result.
// Shared memory starts as NaN between guards. Whatever a GPU would hang or fault on ends the launch with a sentence,
// which cudaGetErrorString then returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>

// Marks the inside of an instruction: its accesses need no check.
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("kernel-address")))

namespace emulator {

inline constexpr std::uint32_t kFullMask = 0xffffffffu;

// End the launch in flight with this error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Run `thread` once for every thread of the grid, block after block.
cudaError_t launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

// Note that the thread in flight executes an instruction.
void count(const char* instruction);

// Fail unless the device of this launch has at least compute capability `sm`.
void require_sm(int sm, const char* instruction);
int device_sm();

// The block's dynamic shared memory, aligned to 16 bytes and no more.
unsigned char* shared_memory();

// Fail unless `bytes` bytes at `pointer` are shared memory, aligned to their number.
void require_shared(const void* pointer, std::size_t bytes, const char* instruction);

// __syncthreads: returns when all threads of the block are here.
void barrier();

// A warp-wide instruction: once all lanes in `mask` are here, `perform` runs once with the operands of all of them.
using Lanes = void* const*;
void collective(std::uint32_t mask, const char* instruction, void* operand, const std::function<void(Lanes)>& perform);

// cp.async and its groups. A copy lands at a random one of the two moments allowed: when begun or when waited for.
void begin_copy(void* shared, const void* global, std::size_t bytes);
void commit_copies();
void wait_for_copies(std::size_t pending);

}  // namespace emulator
