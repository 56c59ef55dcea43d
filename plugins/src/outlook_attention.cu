#include "acmix/outlook_attention.cuh"
#include "launchers.h"

namespace acmix {

#define INSTANTIATE(kHeadDim, kDtype, kLayout)                                             \
    template cudaError_t outlook_attention_simt<Dtype::kDtype, Layout::kLayout, kHeadDim>( \
        const OutlookAttention&, const void*, const void*, void*, cudaStream_t);

ACMIX_FOR_HEAD_DIMS(INSTANTIATE, kFloat32, kNchw)
ACMIX_FOR_HEAD_DIMS(INSTANTIATE, kFloat16, kNchw)
ACMIX_FOR_HEAD_DIMS(INSTANTIATE, kFloat16, kNhwc)

}  // namespace acmix
