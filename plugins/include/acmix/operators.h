// Written by `make docs` from acmix_deploy/operators: edit the definitions there.
#pragma once

#include <cstdint>

namespace acmix {

struct IntAttribute {
    const char* name;
    std::int32_t fallback;
    std::int32_t minimum;
};

struct FloatAttribute {
    const char* name;
    float fallback;
};

namespace local_attention {
inline constexpr const char* kOpType = "AcmixLocalAttention";
inline constexpr const char* kVersion = "1";
inline constexpr IntAttribute kNumHeads{"num_heads", 1, 1};
inline constexpr IntAttribute kKernelSize{"kernel_size", 7, 3};
inline constexpr IntAttribute kStride{"stride", 1, 1};
inline constexpr FloatAttribute kScale{"scale", 1.0f};
inline constexpr std::int32_t kKernelSizes[] = {3, 5, 7, 9};
inline constexpr std::int32_t kStrides[] = {1, 2};
inline constexpr std::int32_t kHeadDims[] = {8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128};
}  // namespace local_attention

namespace outlook_attention {
inline constexpr const char* kOpType = "AcmixOutlookAttention";
inline constexpr const char* kVersion = "1";
inline constexpr IntAttribute kNumHeads{"num_heads", 1, 1};
inline constexpr IntAttribute kKernelSize{"kernel_size", 3, 3};
inline constexpr IntAttribute kStride{"stride", 1, 1};
inline constexpr FloatAttribute kScale{"scale", 1.0f};
inline constexpr std::int32_t kKernelSizes[] = {3, 5, 7};
inline constexpr std::int32_t kStrides[] = {1, 2};
inline constexpr std::int32_t kHeadDims[] = {8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128};
}  // namespace outlook_attention

}  // namespace acmix
