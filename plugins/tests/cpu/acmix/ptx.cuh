// plugins/include/acmix/ptx.cuh for the CPU: the same functions, as the PTX ISA defines the instructions behind them.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

namespace acmix::ptx {

inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }

inline std::uint32_t pack_half2(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    std::uint32_t bits;
    std::memcpy(&bits, &pair, sizeof bits);
    return bits;
}

inline float exp2(float x) {
    emulator::count("ex2");
    return std::exp2(x);
}

inline float reciprocal(float x) { return 1 / x; }

template <class T>
T* advance(T* from, std::uint32_t count, std::uint32_t bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(from) + std::uint64_t{count} * bytes);
}

// Lane l = 4g + t holds, each register two neighbours: of a (row by row) rows g and g + 8, columns 2t and 2t + 1, from
// the third register on 8 columns further; of b (column by column) column g and the same in rows; of d like a.
template <int kDepth>
void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, const float* c, const char* name) {
    struct Operand {
        float* d;
        const std::uint32_t *a, *b;
        const float* c;
    } mine{d, a, b, c};
    emulator::collective(emulator::kFullMask, name, &mine, [](emulator::Lanes lanes) EMULATOR_UNCHECKED {
        float left[16][kDepth], right[kDepth][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& operand = *static_cast<const Operand*>(lanes[lane]);
            const int g = lane / 4, t = lane % 4;
            __half a[kDepth / 2], b[kDepth / 4];
            std::memcpy(a, operand.a, sizeof a);
            std::memcpy(b, operand.b, sizeof b);
            for (int i = 0; i < kDepth / 2; ++i)
                left[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = __half2float(a[i]);
            for (int i = 0; i < kDepth / 4; ++i) right[2 * t + i % 2 + i / 2 * 8][g] = __half2float(b[i]);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                const auto& operand = *static_cast<const Operand*>(lanes[lane]);
                float sum = 0;
                for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
                operand.d[i] = operand.c[i] + sum;
            }
    });
}

inline void mma_k8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b, const float (&c)[4]) {
    emulator::require_sm(75, "mma.m16n8k8");
    mma<8>(d, a, &b, c, "mma.m16n8k8");
}

inline void mma_k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const float (&c)[4]) {
    if (emulator::device_sm() < 80) {
        ACMIX_MMA_K16_BEFORE_SM_80;  // the statements of the other ptx.cuh, which tests/plugin/kernels.py reads there
    } else {
        mma<16>(d, a, b, c, "mma.m16n8k16");
    }
}

template <bool kTranspose, int kCount>
void load_matrices(std::uint32_t (&r)[kCount], const void* row) {
    static_assert(kCount == 2 || kCount == 4);
    struct Operand {
        std::uint32_t* r;
        const void* row;
    } mine{r, row};
    emulator::require_sm(75, "ldmatrix");
    emulator::require_shared(row, 16, "ldmatrix");  // sm_75 wants it of the lanes that are not used, too
    const char* name = kTranspose ? "ldmatrix.trans" : "ldmatrix";
    emulator::collective(emulator::kFullMask, name, &mine, [](emulator::Lanes lanes) EMULATOR_UNCHECKED {
        std::uint16_t rows[8 * kCount][8];
        for (int i = 0; i < 8 * kCount; ++i) std::memcpy(rows[i], static_cast<const Operand*>(lanes[i])->row, 16);
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < kCount; ++i) {
                const int g = lane / 4, t = lane % 4;
                const auto* matrix = &rows[8 * i];
                const std::uint16_t low = kTranspose ? matrix[2 * t][g] : matrix[g][2 * t];
                const std::uint16_t high = kTranspose ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
                static_cast<const Operand*>(lanes[lane])->r[i] = low | static_cast<std::uint32_t>(high) << 16;
            }
    });
}

template <int kBytes>
void copy_async(void* shared, const void* global, bool inside) {
    static_assert(kBytes == 8 || kBytes == 16);
    static const std::uint32_t zeros[4] = {};
    emulator::begin_copy(shared, inside ? global : zeros, kBytes);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int kPending>
void wait_for_copies() {
    emulator::wait_for_copies(kPending);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
                   const std::decay_t<Parameters>&... arguments) {
    return emulator::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace acmix::ptx
