#include "acmix/local_attention_mma.cuh"
#include "launchers.h"

namespace acmix {

#define INSTANTIATE(kHeadDim, kDtype, kLayout)                                          \
    template cudaError_t local_attention_mma<Dtype::kDtype, Layout::kLayout, kHeadDim>( \
        const LocalAttention&, const void*, const void*, void*, cudaStream_t);

ACMIX_FOR_HEAD_DIMS(INSTANTIATE, kFloat16, kNchw)
ACMIX_FOR_HEAD_DIMS(INSTANTIATE, kFloat16, kNhwc)

}  // namespace acmix
