// CUDA C++'s words, as much of them as the kernels use.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::barrier(); }

inline void __syncwarp(std::uint32_t mask = emulator::kFullMask) {
    emulator::collective(mask, "__syncwarp", nullptr, [](emulator::Lanes) {});
}

// Each lane of the mask receives the value of lane `source`, one of the mask.
template <class T>
T shuffle(std::uint32_t mask, const char* name, T value, unsigned source) {
    struct Operand {
        T in, out;
        unsigned source;
    } mine{value, value, source % 32};
    emulator::collective(mask, name, &mine, [name](emulator::Lanes lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            if (lanes[lane] == nullptr) continue;
            auto& operand = *static_cast<Operand*>(lanes[lane]);
            const auto* from = static_cast<const Operand*>(lanes[operand.source]);
            if (from == nullptr) emulator::fail("%s: reads lane %u, which the mask leaves out", name, operand.source);
            operand.out = from->in;
        }
    });
    return mine.out;
}

inline unsigned lane_index() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <class T>
T __shfl_sync(std::uint32_t mask, T value, int source) {
    return shuffle(mask, "__shfl_sync", value, source);
}

template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, int lane_mask) {
    return shuffle(mask, "__shfl_xor_sync", value, lane_index() ^ lane_mask);
}

inline int __any_sync(std::uint32_t mask, int predicate) {
    struct Operand {
        int in, out;
    } mine{predicate, 0};
    emulator::collective(mask, "__any_sync", &mine, [](emulator::Lanes lanes) {
        int any = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (lanes[lane] && static_cast<Operand*>(lanes[lane])->in) any = 1;
        for (int lane = 0; lane < 32; ++lane)
            if (lanes[lane]) static_cast<Operand*>(lanes[lane])->out = any;
    });
    return mine.out;
}
