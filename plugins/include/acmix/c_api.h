// The kernels behind C linkage, for ctypes and foreign runtimes.
#pragma once

#include "acmix/launch.h"

#define ACMIX_EXPORT __attribute__((visibility("default")))

extern "C" {

// What the library holds, one JSON object: {"version", "cuda", "architectures", "entries"}, where an entry is
// {"operator", "dtype", "layout", "head_dim", "kernel", "min_sm"}.
ACMIX_EXPORT const char* acmix_describe();

// Launch on the current device. `kernel` is an acmix::Kernel or -1 for what find() takes.
// Returns null when the launch was accepted, else one sentence that stays valid until the thread's next call.
ACMIX_EXPORT const char* acmix_local_attention(const acmix::LocalAttention* problem, int kernel, const void* qkv,
                                               const void* position_weight, void* y, cudaStream_t stream);
ACMIX_EXPORT const char* acmix_outlook_attention(const acmix::OutlookAttention* problem, int kernel, const void* logits,
                                                 const void* values, void* y, cudaStream_t stream);
}
