// The kernels behind C linkage, for ctypes and foreign runtimes.
#pragma once

#include "acmix/operators.h"

extern "C" {

// What the library holds, one JSON object: {"version", "sources", "cuda", "architectures", "entries"}, where an entry
// is {"operator", "dtype", "layout", "head_dim", "kernel", "min_sm"}.
ACMIX_EXPORT const char* acmix_describe();

// The functions at the end of acmix/operators.h launch on the current device. `kernel` is an acmix::Kernel or -1 for
// what find() takes. They return null when the launch was accepted, else one sentence that stays valid until the
// thread's next call.
}
