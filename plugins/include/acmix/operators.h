// Written by `make docs` from acmix_deploy/operators: edit the definitions there.
// clang-format off
#pragma once

#include <cuda_runtime_api.h>

#include <limits>
#include <tuple>

#include "acmix/definition.h"

namespace acmix {

// qkv = [q | k | v], each [B, N*d, H, W]; y_i = softmax_n(scale * q_i . (k_n - P l_n)) v_n, where n runs over the K x K neighbours of pixel i under reflection padding and l = (x, y) in [-1, 1]^2
//   qkv [B, 3*N*d, H, W]: queries, keys and values, each N heads of d channels
//   position_weight [d, 2]: P; zeros where the block has no position term
//   y [B, N*d, H/s, W/s]: attended values
struct LocalAttention {
    Dtype dtype;
    Layout layout;
    std::int32_t batch;  // B
    std::int32_t num_heads;  // N
    std::int32_t head_dim;  // d
    std::int32_t height;  // H
    std::int32_t width;  // W
    std::int32_t kernel_size;  // K
    std::int32_t stride;  // s
    float scale;
};

template <>
struct Definition<LocalAttention> {
    using P = LocalAttention;
    static constexpr const char* kOpType = "AcmixLocalAttention";
    static constexpr const char* kVersion = "1";
    static constexpr Member<P> kPadded = &P::head_dim;
    static constexpr std::int32_t kKernelSizes[] = {3, 5, 7, 9};
    static constexpr std::int32_t kStrides[] = {1, 2};
    static constexpr std::int32_t kHeadDims[] = {8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128};
    static constexpr Size<P> kSizes[] = {
        {"batch", &P::batch},
        {"num_heads", &P::num_heads},
        {"head_dim", &P::head_dim, kHeadDims},
        {"height", &P::height},
        {"width", &P::width},
        {"kernel_size", &P::kernel_size, kKernelSizes},
        {"stride", &P::stride, kStrides}};
    static constexpr std::tuple kAttributes{
        Attribute<P, std::int32_t>{"num_heads", &P::num_heads, 1, 1},
        Attribute<P, std::int32_t>{"kernel_size", &P::kernel_size, 7, 3},
        Attribute<P, std::int32_t>{"stride", &P::stride, 1, 1},
        Attribute<P, float>{"scale", &P::scale, 1.0f, std::numeric_limits<float>::lowest()}};
    static constexpr Axis<P> kQkv[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"3 * num_heads * head_dim", 3, {{&P::num_heads, 1}, {&P::head_dim, 1}}, 1, false},
        {"height", 1, {{&P::height, 1}}, 1, false},
        {"width", 1, {{&P::width, 1}}, 1, false}};
    static constexpr Axis<P> kPositionWeight[] = {
        {"head_dim", 1, {{&P::head_dim, 1}}, 1, false},
        {"2", 2, {}, 1, false}};
    static constexpr Axis<P> kY[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"num_heads * head_dim", 1, {{&P::num_heads, 1}, {&P::head_dim, 1}}, 1, false},
        {"height / stride", 1, {{&P::height, 1}, {&P::stride, -1}}, 1, false},
        {"width / stride", 1, {{&P::width, 1}, {&P::stride, -1}}, 1, false}};
    static constexpr Tensor<P> kInputs[] = {
        {"qkv", kQkv},
        {"position_weight", kPositionWeight}};
    static constexpr Tensor<P> kOutputs[] = {
        {"y", kY}};
    static constexpr Bound<P> kBounds[] = {
        {{"height", 1, {{&P::height, 1}}, 1, false}, {"ceil(kernel_size / 2)", 1, {{&P::kernel_size, 1}}, 2, true}, false},
        {{"width", 1, {{&P::width, 1}}, 1, false}, {"ceil(kernel_size / 2)", 1, {{&P::kernel_size, 1}}, 2, true}, false},
        {{"batch", 1, {{&P::batch, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"height", 1, {{&P::height, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"num_heads", 1, {{&P::num_heads, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"height * width", 1, {{&P::height, 1}, {&P::width, 1}}, 1, false}, {"2147482623", 2147482623, {}, 1, false}, true},
        {{"3 * num_heads * head_dim * width", 3, {{&P::num_heads, 1}, {&P::head_dim, 1}, {&P::width, 1}}, 1, false}, {"2147482623", 2147482623, {}, 1, false}, true}};
};

// qkv = [q | k | v], each [B, N*d, H, W]; y_i = softmax_n(scale * q_i . (k_n - P l_n) + bias_in) v_n, where n runs over the K x K pixels around i that are D apart and l = (x, y) in [-1, 1]^2; bias_in is entry (n - i) / D + K - 1 of its head, row y and column x; beyond the map are zeros with a logit of bias_in (border 1), or nothing (2), or nothing and the window moves inside the pixels i + D m (3)
//   qkv [B, 3*N*d, H, W]: queries, keys and values, each N heads of d channels
//   position_weight [d, 2]: P; zeros where there is no position term
//   bias [N, 2*K-1, 2*K-1]: by relative offset; zeros where there is none
//   y [B, N*d, H, W]: attended values
struct NeighborhoodAttention {
    Dtype dtype;
    Layout layout;
    std::int32_t batch;  // B
    std::int32_t num_heads;  // N
    std::int32_t head_dim;  // d
    std::int32_t height;  // H
    std::int32_t width;  // W
    std::int32_t kernel_size;  // K
    std::int32_t dilation;  // D
    std::int32_t border;  // b
    float scale;
};

template <>
struct Definition<NeighborhoodAttention> {
    using P = NeighborhoodAttention;
    static constexpr const char* kOpType = "AcmixNeighborhoodAttention";
    static constexpr const char* kVersion = "1";
    static constexpr Member<P> kPadded = &P::head_dim;
    static constexpr std::int32_t kZeros = 1;
    static constexpr std::int32_t kMasked = 2;
    static constexpr std::int32_t kShifted = 3;
    static constexpr std::int32_t kKernelSizes[] = {3, 5, 7, 9};
    static constexpr std::int32_t kBorders[] = {1, 2, 3};
    static constexpr std::int32_t kHeadDims[] = {8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128};
    static constexpr Size<P> kSizes[] = {
        {"batch", &P::batch},
        {"num_heads", &P::num_heads},
        {"head_dim", &P::head_dim, kHeadDims},
        {"height", &P::height},
        {"width", &P::width},
        {"kernel_size", &P::kernel_size, kKernelSizes},
        {"dilation", &P::dilation},
        {"border", &P::border, kBorders}};
    static constexpr std::tuple kAttributes{
        Attribute<P, std::int32_t>{"num_heads", &P::num_heads, 1, 1},
        Attribute<P, std::int32_t>{"kernel_size", &P::kernel_size, 7, 3},
        Attribute<P, std::int32_t>{"dilation", &P::dilation, 1, 1},
        Attribute<P, std::int32_t>{"border", &P::border, 1, 1},
        Attribute<P, float>{"scale", &P::scale, 1.0f, std::numeric_limits<float>::lowest()}};
    static constexpr Axis<P> kQkv[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"3 * num_heads * head_dim", 3, {{&P::num_heads, 1}, {&P::head_dim, 1}}, 1, false},
        {"height", 1, {{&P::height, 1}}, 1, false},
        {"width", 1, {{&P::width, 1}}, 1, false}};
    static constexpr Axis<P> kPositionWeight[] = {
        {"head_dim", 1, {{&P::head_dim, 1}}, 1, false},
        {"2", 2, {}, 1, false}};
    static constexpr Axis<P> kBias[] = {
        {"num_heads", 1, {{&P::num_heads, 1}}, 1, false},
        {"2 * kernel_size - 1", 2, {{&P::kernel_size, 1}}, 1, false, 1},
        {"2 * kernel_size - 1", 2, {{&P::kernel_size, 1}}, 1, false, 1}};
    static constexpr Axis<P> kY[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"num_heads * head_dim", 1, {{&P::num_heads, 1}, {&P::head_dim, 1}}, 1, false},
        {"height", 1, {{&P::height, 1}}, 1, false},
        {"width", 1, {{&P::width, 1}}, 1, false}};
    static constexpr Tensor<P> kInputs[] = {
        {"qkv", kQkv},
        {"position_weight", kPositionWeight},
        {"bias", kBias}};
    static constexpr Tensor<P> kOutputs[] = {
        {"y", kY}};
    static constexpr Bound<P> kBounds[] = {
        {{"height", 1, {{&P::height, 1}}, 1, false}, {"kernel_size * dilation", 1, {{&P::kernel_size, 1}, {&P::dilation, 1}}, 1, false}, false, &P::border, 3},
        {{"width", 1, {{&P::width, 1}}, 1, false}, {"kernel_size * dilation", 1, {{&P::kernel_size, 1}, {&P::dilation, 1}}, 1, false}, false, &P::border, 3},
        {{"batch", 1, {{&P::batch, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"height", 1, {{&P::height, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"num_heads", 1, {{&P::num_heads, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"height * width", 1, {{&P::height, 1}, {&P::width, 1}}, 1, false}, {"2147482623", 2147482623, {}, 1, false}, true},
        {{"3 * num_heads * head_dim * width", 3, {{&P::num_heads, 1}, {&P::head_dim, 1}, {&P::width, 1}}, 1, false}, {"2147482623", 2147482623, {}, 1, false}, true},
        {{"dilation", 1, {{&P::dilation, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true}};
};

// y = fold(softmax_from(scale * logits) unfold(values)), windows of K x K pixels with zero padding K // 2 around every s-th pixel; channel (n*K^2 + to)*K^2 + from of logits is the weight in head n with which place 'from' of a window adds to its place 'to'
//   logits [B, N*K^4, ceil(H/s), ceil(W/s)]: attention logits of every window, N heads
//   values [B, N*d, H, W]: N heads of d channels
//   y [B, N*d, H, W]: sum over the windows that cover a pixel
struct OutlookAttention {
    Dtype dtype;
    Layout layout;
    std::int32_t batch;  // B
    std::int32_t num_heads;  // N
    std::int32_t head_dim;  // d
    std::int32_t height;  // H
    std::int32_t width;  // W
    std::int32_t kernel_size;  // K
    std::int32_t stride;  // s
    float scale;
};

template <>
struct Definition<OutlookAttention> {
    using P = OutlookAttention;
    static constexpr const char* kOpType = "AcmixOutlookAttention";
    static constexpr const char* kVersion = "1";
    static constexpr Member<P> kPadded = &P::head_dim;
    static constexpr std::int32_t kKernelSizes[] = {3, 5, 7};
    static constexpr std::int32_t kStrides[] = {1, 2};
    static constexpr std::int32_t kHeadDims[] = {8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128};
    static constexpr Size<P> kSizes[] = {
        {"batch", &P::batch},
        {"num_heads", &P::num_heads},
        {"head_dim", &P::head_dim, kHeadDims},
        {"height", &P::height},
        {"width", &P::width},
        {"kernel_size", &P::kernel_size, kKernelSizes},
        {"stride", &P::stride, kStrides}};
    static constexpr std::tuple kAttributes{
        Attribute<P, std::int32_t>{"num_heads", &P::num_heads, 1, 1},
        Attribute<P, std::int32_t>{"kernel_size", &P::kernel_size, 3, 3},
        Attribute<P, std::int32_t>{"stride", &P::stride, 1, 1},
        Attribute<P, float>{"scale", &P::scale, 1.0f, std::numeric_limits<float>::lowest()}};
    static constexpr Axis<P> kLogits[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"num_heads * kernel_size^4", 1, {{&P::num_heads, 1}, {&P::kernel_size, 4}}, 1, false},
        {"ceil(height / stride)", 1, {{&P::height, 1}, {&P::stride, -1}}, 1, true},
        {"ceil(width / stride)", 1, {{&P::width, 1}, {&P::stride, -1}}, 1, true}};
    static constexpr Axis<P> kValues[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"num_heads * head_dim", 1, {{&P::num_heads, 1}, {&P::head_dim, 1}}, 1, false},
        {"height", 1, {{&P::height, 1}}, 1, false},
        {"width", 1, {{&P::width, 1}}, 1, false}};
    static constexpr Axis<P> kY[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"num_heads * head_dim", 1, {{&P::num_heads, 1}, {&P::head_dim, 1}}, 1, false},
        {"height", 1, {{&P::height, 1}}, 1, false},
        {"width", 1, {{&P::width, 1}}, 1, false}};
    static constexpr Tensor<P> kInputs[] = {
        {"logits", kLogits},
        {"values", kValues}};
    static constexpr Tensor<P> kOutputs[] = {
        {"y", kY}};
    static constexpr Bound<P> kBounds[] = {
        {{"batch", 1, {{&P::batch, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"height", 1, {{&P::height, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"num_heads", 1, {{&P::num_heads, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"height * width", 1, {{&P::height, 1}, {&P::width, 1}}, 1, false}, {"2147482623", 2147482623, {}, 1, false}, true},
        {{"3 * num_heads * head_dim * width", 3, {{&P::num_heads, 1}, {&P::head_dim, 1}, {&P::width, 1}}, 1, false}, {"2147482623", 2147482623, {}, 1, false}, true},
        {{"num_heads * kernel_size^4 * width", 1, {{&P::num_heads, 1}, {&P::kernel_size, 4}, {&P::width, 1}}, 1, false}, {"1976660141", 1976660141, {}, 1, false}, true}};
};

// y[b, g*c + i, p] = sum over the K x K neighbours n of w[b, g*K^2 + n, p] * x[b, g*c + i, floor(s * p / u) + D * n], with zeros outside the map; n counts from -(K // 2), row by row
//   x [B, G*c, H, W]: G groups of c channels
//   w [B, G*K^2, H*u/s, W*u/s]: weights of the neighbours of every output pixel, as they are
//   y [B, G*c, H*u/s, W*u/s]: weighted sums
struct Reassembly {
    Dtype dtype;
    Layout layout;
    std::int32_t batch;  // B
    std::int32_t groups;  // G
    std::int32_t group_channels;  // c
    std::int32_t height;  // H
    std::int32_t width;  // W
    std::int32_t kernel_size;  // K
    std::int32_t stride;  // s
    std::int32_t upsampling;  // u
    std::int32_t dilation;  // D
};

template <>
struct Definition<Reassembly> {
    using P = Reassembly;
    static constexpr const char* kOpType = "AcmixReassembly";
    static constexpr const char* kVersion = "1";
    static constexpr Member<P> kPadded = nullptr;
    static constexpr std::int32_t kKernelSizes[] = {3, 5, 7, 9};
    static constexpr std::int32_t kStrides[] = {1, 2};
    static constexpr std::int32_t kUpsamplings[] = {1, 2, 3, 4};
    static constexpr Size<P> kSizes[] = {
        {"batch", &P::batch},
        {"groups", &P::groups},
        {"group_channels", &P::group_channels},
        {"height", &P::height},
        {"width", &P::width},
        {"kernel_size", &P::kernel_size, kKernelSizes},
        {"stride", &P::stride, kStrides},
        {"upsampling", &P::upsampling, kUpsamplings},
        {"dilation", &P::dilation}};
    static constexpr std::tuple kAttributes{
        Attribute<P, std::int32_t>{"groups", &P::groups, 1, 1},
        Attribute<P, std::int32_t>{"kernel_size", &P::kernel_size, 7, 3},
        Attribute<P, std::int32_t>{"stride", &P::stride, 1, 1},
        Attribute<P, std::int32_t>{"upsampling", &P::upsampling, 1, 1},
        Attribute<P, std::int32_t>{"dilation", &P::dilation, 1, 1}};
    static constexpr Axis<P> kX[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"groups * group_channels", 1, {{&P::groups, 1}, {&P::group_channels, 1}}, 1, false},
        {"height", 1, {{&P::height, 1}}, 1, false},
        {"width", 1, {{&P::width, 1}}, 1, false}};
    static constexpr Axis<P> kW[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"groups * kernel_size^2", 1, {{&P::groups, 1}, {&P::kernel_size, 2}}, 1, false},
        {"height * upsampling / stride", 1, {{&P::height, 1}, {&P::upsampling, 1}, {&P::stride, -1}}, 1, false},
        {"width * upsampling / stride", 1, {{&P::width, 1}, {&P::upsampling, 1}, {&P::stride, -1}}, 1, false}};
    static constexpr Axis<P> kY[] = {
        {"batch", 1, {{&P::batch, 1}}, 1, false},
        {"groups * group_channels", 1, {{&P::groups, 1}, {&P::group_channels, 1}}, 1, false},
        {"height * upsampling / stride", 1, {{&P::height, 1}, {&P::upsampling, 1}, {&P::stride, -1}}, 1, false},
        {"width * upsampling / stride", 1, {{&P::width, 1}, {&P::upsampling, 1}, {&P::stride, -1}}, 1, false}};
    static constexpr Tensor<P> kInputs[] = {
        {"x", kX},
        {"w", kW}};
    static constexpr Tensor<P> kOutputs[] = {
        {"y", kY}};
    static constexpr Bound<P> kBounds[] = {
        {{"batch", 1, {{&P::batch, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"groups * group_channels", 1, {{&P::groups, 1}, {&P::group_channels, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true},
        {{"height * width * upsampling^2", 1, {{&P::height, 1}, {&P::width, 1}, {&P::upsampling, 2}}, 1, false}, {"2147482623", 2147482623, {}, 1, false}, true},
        {{"groups * group_channels * width * upsampling", 1, {{&P::groups, 1}, {&P::group_channels, 1}, {&P::width, 1}, {&P::upsampling, 1}}, 1, false}, {"268435327", 268435327, {}, 1, false}, true},
        {{"groups * kernel_size^2 * width * upsampling", 1, {{&P::groups, 1}, {&P::kernel_size, 2}, {&P::width, 1}, {&P::upsampling, 1}}, 1, false}, {"1207958975", 1207958975, {}, 1, false}, true},
        {{"dilation", 1, {{&P::dilation, 1}}, 1, false}, {"65535", 65535, {}, 1, false}, true}};
};

using Operators = List<LocalAttention, NeighborhoodAttention, OutlookAttention, Reassembly>;

}  // namespace acmix

extern "C" {
ACMIX_EXPORT const char* acmix_local_attention(const acmix::LocalAttention* problem, int kernel, const void* qkv, const void* position_weight, void* y, cudaStream_t stream);
ACMIX_EXPORT const char* acmix_neighborhood_attention(const acmix::NeighborhoodAttention* problem, int kernel, const void* qkv, const void* position_weight, const void* bias, void* y, cudaStream_t stream);
ACMIX_EXPORT const char* acmix_outlook_attention(const acmix::OutlookAttention* problem, int kernel, const void* logits, const void* values, void* y, cudaStream_t stream);
ACMIX_EXPORT const char* acmix_reassembly(const acmix::Reassembly* problem, int kernel, const void* x, const void* w, void* y, cudaStream_t stream);
}
