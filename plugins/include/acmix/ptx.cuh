// The instructions that CUDA C++ has no portable name for. plugins/tests/cpu holds a second version of this file that
// computes the same on a CPU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace acmix::ptx {

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char acmix_shared[];
    return acmix_shared;
}

// Two floats rounded to half, `low` in the lower 16 bits.
__device__ __forceinline__ std::uint32_t pack_half2(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// 2^x, relative error 2^-22.
__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, relative error 2^-23.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The address in global memory that lies `count` times `bytes` behind `from`, in one instruction.
template <class T>
__device__ __forceinline__ T* advance(T* from, std::uint32_t count, std::uint32_t bytes) {
    T* to;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(count), "r"(bytes), "l"(from));
    __builtin_assume(__isGlobal(to));
    return to;
}

// d = a b + c for a 16x8 of halves, b 8x8, c and d 16x8 of floats, in the register layout of mma.m16n8k8 (sm_75).
__device__ __forceinline__ void mma_k8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b,
                                       const float (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// d = a b + c for a 16x16 of halves, b 16x8, c and d 16x8 of floats, in the register layout of mma.m16n8k16.
__device__ __forceinline__ void mma_k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                        const float (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    mma_k8(d, {a[0], a[1]}, b[0], c);
    mma_k8(d, {a[2], a[3]}, b[1], d);
#endif
}

// Load 8x8 matrices of halves from shared memory: lane 8i + j gives the address of row j of matrix i (16 bytes,
// aligned) and receives, of every matrix, elements 2 * (lane % 4) and the next of row lane / 4; of its transpose with
// kTranspose.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTranspose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
#endif
}

// The same for two matrices; the addresses come from lanes 0 to 15.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[2], const void* row) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTranspose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(address)
                     : "memory");
    }
#endif
}

// Begin to copy kBytes (8 or 16) from global to shared memory, both aligned to kBytes; a plain copy before sm_80.
// Writes zeros and reads nothing where not `inside`.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
    static_assert(kBytes == 8 || kBytes == 16, "cp.async copies 8 or 16 bytes here");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = inside ? kBytes : 0;
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
    }
#else
    using Word = std::conditional_t<kBytes == 16, uint4, uint2>;
    *static_cast<Word*>(shared) = inside ? *static_cast<const Word*>(global) : Word{};
#endif
}

// Close the group of copies begun since the last call.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), and what the launch itself reports.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   const std::decay_t<Parameters>&... arguments) {
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    return cudaGetLastError();
}

}  // namespace acmix::ptx
