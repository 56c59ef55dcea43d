// The softmax over logits that arrive in portions (online softmax, arXiv 1805.02867), in powers of two.
#pragma once

#include "acmix/ptx.cuh"

namespace acmix {

inline constexpr float kLog2E = 1.44269504f;

inline constexpr float kNoMaximum = -1e30f;  // finite, so that a masked logit of -inf weighs 0 against it
inline constexpr float kSlack = 8;           // how far, as a power of two, logits may outgrow the maximum in use

// The largest logit so far, in units of log 2.
struct RunningMax {
    float value = kNoMaximum;

    // Take in a portion's largest logit; returns the factor that corrects what was summed before.
    __device__ __forceinline__ float raise(float portion) {
        const float before = value;
        value = fmaxf(value, portion);
        return ptx::exp2(before - value);
    }
};

}  // namespace acmix
