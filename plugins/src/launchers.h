// The launchers that the dispatch table names; each .cu file of this folder instantiates its own.
#pragma once

#include "acmix/launch.h"

// DO(head_dim, ...) for every head_dim that kernels are compiled for; others are padded to the next.
#define ACMIX_FOR_HEAD_DIMS(DO, ...) DO(16, __VA_ARGS__) DO(32, __VA_ARGS__) DO(64, __VA_ARGS__) DO(128, __VA_ARGS__)

namespace acmix {

inline constexpr std::int32_t kMaxHeadDim = 128;  // the last of them

template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t local_attention_simt(const LocalAttention&, const void*, const void*, void*, cudaStream_t);

template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t local_attention_mma(const LocalAttention&, const void*, const void*, void*, cudaStream_t);

template <Dtype kDtype, Layout kLayout, int kHeadDim>
cudaError_t outlook_attention_simt(const OutlookAttention&, const void*, const void*, void*, cudaStream_t);

}  // namespace acmix
