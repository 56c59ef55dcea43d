// Written by `make docs` from acmix_deploy/operators: edit the definitions there.
// clang-format off
#include "acmix/neighborhood_attention_simt.cuh"

namespace acmix {

template cudaError_t neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 16>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 32>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 64>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 128>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 16>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 32>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 64>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 128>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 16>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 32>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 64>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template cudaError_t neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 128>(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);

}  // namespace acmix
