// Written by `make docs` from acmix_deploy/operators: edit the definitions there.
// clang-format off
#include "acmix/reassembly_simt.cuh"

namespace acmix {

template cudaError_t reassembly_simt<Dtype::kFloat32, Layout::kNchw, 0>(const Reassembly&, const void* const*, void*, cudaStream_t);
template cudaError_t reassembly_simt<Dtype::kFloat16, Layout::kNchw, 0>(const Reassembly&, const void* const*, void*, cudaStream_t);
template cudaError_t reassembly_simt<Dtype::kFloat16, Layout::kNhwc, 0>(const Reassembly&, const void* const*, void*, cudaStream_t);

}  // namespace acmix
