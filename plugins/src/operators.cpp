// Written by `make docs` from acmix_deploy/operators: edit the definitions there.
// clang-format off
#include "dispatch.h"

namespace acmix {

template <Dtype, Layout, int>
cudaError_t local_attention_mma(const LocalAttention&, const void* const*, void*, cudaStream_t);
template <Dtype, Layout, int>
cudaError_t local_attention_simt(const LocalAttention&, const void* const*, void*, cudaStream_t);

template <>
Span<Entry<LocalAttention>> table() {
    static constexpr Entry<LocalAttention> kRows[] = {
        {Dtype::kFloat16, Layout::kNchw, 16, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNchw, 16>},
        {Dtype::kFloat16, Layout::kNchw, 32, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNchw, 32>},
        {Dtype::kFloat16, Layout::kNchw, 64, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNchw, 64>},
        {Dtype::kFloat16, Layout::kNchw, 128, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNhwc, 16, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNhwc, 16>},
        {Dtype::kFloat16, Layout::kNhwc, 32, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNhwc, 32>},
        {Dtype::kFloat16, Layout::kNhwc, 64, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNhwc, 64>},
        {Dtype::kFloat16, Layout::kNhwc, 128, Kernel::kMma, 75, local_attention_mma<Dtype::kFloat16, Layout::kNhwc, 128>},
        {Dtype::kFloat32, Layout::kNchw, 16, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat32, Layout::kNchw, 16>},
        {Dtype::kFloat32, Layout::kNchw, 32, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat32, Layout::kNchw, 32>},
        {Dtype::kFloat32, Layout::kNchw, 64, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat32, Layout::kNchw, 64>},
        {Dtype::kFloat32, Layout::kNchw, 128, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat32, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNchw, 16, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNchw, 16>},
        {Dtype::kFloat16, Layout::kNchw, 32, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNchw, 32>},
        {Dtype::kFloat16, Layout::kNchw, 64, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNchw, 64>},
        {Dtype::kFloat16, Layout::kNchw, 128, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNhwc, 16, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNhwc, 16>},
        {Dtype::kFloat16, Layout::kNhwc, 32, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNhwc, 32>},
        {Dtype::kFloat16, Layout::kNhwc, 64, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNhwc, 64>},
        {Dtype::kFloat16, Layout::kNhwc, 128, Kernel::kSimt, 0, local_attention_simt<Dtype::kFloat16, Layout::kNhwc, 128>}};
    return kRows;
}

template Found<LocalAttention> find(const LocalAttention&, std::int32_t, const Kernel*);
template std::string launch(const LocalAttention&, const void* const*, void*, cudaStream_t, const Kernel*);

template <Dtype, Layout, int>
cudaError_t neighborhood_attention_mma(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);
template <Dtype, Layout, int>
cudaError_t neighborhood_attention_simt(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t);

template <>
Span<Entry<NeighborhoodAttention>> table() {
    static constexpr Entry<NeighborhoodAttention> kRows[] = {
        {Dtype::kFloat16, Layout::kNchw, 16, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNchw, 16>},
        {Dtype::kFloat16, Layout::kNchw, 32, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNchw, 32>},
        {Dtype::kFloat16, Layout::kNchw, 64, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNchw, 64>},
        {Dtype::kFloat16, Layout::kNchw, 128, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNhwc, 16, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNhwc, 16>},
        {Dtype::kFloat16, Layout::kNhwc, 32, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNhwc, 32>},
        {Dtype::kFloat16, Layout::kNhwc, 64, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNhwc, 64>},
        {Dtype::kFloat16, Layout::kNhwc, 128, Kernel::kMma, 75, neighborhood_attention_mma<Dtype::kFloat16, Layout::kNhwc, 128>},
        {Dtype::kFloat32, Layout::kNchw, 16, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 16>},
        {Dtype::kFloat32, Layout::kNchw, 32, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 32>},
        {Dtype::kFloat32, Layout::kNchw, 64, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 64>},
        {Dtype::kFloat32, Layout::kNchw, 128, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat32, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNchw, 16, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 16>},
        {Dtype::kFloat16, Layout::kNchw, 32, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 32>},
        {Dtype::kFloat16, Layout::kNchw, 64, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 64>},
        {Dtype::kFloat16, Layout::kNchw, 128, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNhwc, 16, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 16>},
        {Dtype::kFloat16, Layout::kNhwc, 32, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 32>},
        {Dtype::kFloat16, Layout::kNhwc, 64, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 64>},
        {Dtype::kFloat16, Layout::kNhwc, 128, Kernel::kSimt, 0, neighborhood_attention_simt<Dtype::kFloat16, Layout::kNhwc, 128>}};
    return kRows;
}

template Found<NeighborhoodAttention> find(const NeighborhoodAttention&, std::int32_t, const Kernel*);
template std::string launch(const NeighborhoodAttention&, const void* const*, void*, cudaStream_t, const Kernel*);

template <Dtype, Layout, int>
cudaError_t outlook_attention_simt(const OutlookAttention&, const void* const*, void*, cudaStream_t);

template <>
Span<Entry<OutlookAttention>> table() {
    static constexpr Entry<OutlookAttention> kRows[] = {
        {Dtype::kFloat32, Layout::kNchw, 16, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat32, Layout::kNchw, 16>},
        {Dtype::kFloat32, Layout::kNchw, 32, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat32, Layout::kNchw, 32>},
        {Dtype::kFloat32, Layout::kNchw, 64, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat32, Layout::kNchw, 64>},
        {Dtype::kFloat32, Layout::kNchw, 128, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat32, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNchw, 16, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNchw, 16>},
        {Dtype::kFloat16, Layout::kNchw, 32, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNchw, 32>},
        {Dtype::kFloat16, Layout::kNchw, 64, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNchw, 64>},
        {Dtype::kFloat16, Layout::kNchw, 128, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNchw, 128>},
        {Dtype::kFloat16, Layout::kNhwc, 16, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNhwc, 16>},
        {Dtype::kFloat16, Layout::kNhwc, 32, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNhwc, 32>},
        {Dtype::kFloat16, Layout::kNhwc, 64, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNhwc, 64>},
        {Dtype::kFloat16, Layout::kNhwc, 128, Kernel::kSimt, 0, outlook_attention_simt<Dtype::kFloat16, Layout::kNhwc, 128>}};
    return kRows;
}

template Found<OutlookAttention> find(const OutlookAttention&, std::int32_t, const Kernel*);
template std::string launch(const OutlookAttention&, const void* const*, void*, cudaStream_t, const Kernel*);

template <Dtype, Layout, int>
cudaError_t reassembly_simt(const Reassembly&, const void* const*, void*, cudaStream_t);

template <>
Span<Entry<Reassembly>> table() {
    static constexpr Entry<Reassembly> kRows[] = {
        {Dtype::kFloat32, Layout::kNchw, 0, Kernel::kSimt, 0, reassembly_simt<Dtype::kFloat32, Layout::kNchw, 0>},
        {Dtype::kFloat16, Layout::kNchw, 0, Kernel::kSimt, 0, reassembly_simt<Dtype::kFloat16, Layout::kNchw, 0>},
        {Dtype::kFloat16, Layout::kNhwc, 0, Kernel::kSimt, 0, reassembly_simt<Dtype::kFloat16, Layout::kNhwc, 0>}};
    return kRows;
}

template Found<Reassembly> find(const Reassembly&, std::int32_t, const Kernel*);
template std::string launch(const Reassembly&, const void* const*, void*, cudaStream_t, const Kernel*);

}  // namespace acmix

extern "C" {
const char* acmix_local_attention(const acmix::LocalAttention* problem, int kernel, const void* qkv, const void* position_weight, void* y, cudaStream_t stream) {
    const void* const inputs[] = {qkv, position_weight};
    return acmix::launch_on_device(problem, kernel, inputs, y, stream);
}
const char* acmix_neighborhood_attention(const acmix::NeighborhoodAttention* problem, int kernel, const void* qkv, const void* position_weight, const void* bias, void* y, cudaStream_t stream) {
    const void* const inputs[] = {qkv, position_weight, bias};
    return acmix::launch_on_device(problem, kernel, inputs, y, stream);
}
const char* acmix_outlook_attention(const acmix::OutlookAttention* problem, int kernel, const void* logits, const void* values, void* y, cudaStream_t stream) {
    const void* const inputs[] = {logits, values};
    return acmix::launch_on_device(problem, kernel, inputs, y, stream);
}
const char* acmix_reassembly(const acmix::Reassembly* problem, int kernel, const void* x, const void* w, void* y, cudaStream_t stream) {
    const void* const inputs[] = {x, w};
    return acmix::launch_on_device(problem, kernel, inputs, y, stream);
}
}
