// Attributes of a node or of a plugin in an engine file, as TensorRT hands them over.
#pragma once

#include <NvInfer.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "acmix/operators.h"

namespace acmix::tensorrt {

// What an engine file keeps of a plugin has this version; a plugin of another one is refused.
inline constexpr std::int32_t kPlanVersion = 1;
inline constexpr const char* kPlanField = "acmix_plan";

// The attributes that all operators have.
struct Attributes {
    std::int32_t num_heads;
    std::int32_t kernel_size;
    std::int32_t stride;
    float scale;
};

// The values that an attribute may have.
struct Choices {
    const std::int32_t* first;
    const std::int32_t* last;

    template <std::size_t kCount>
    constexpr explicit Choices(const std::int32_t (&values)[kCount]) : first(values), last(values + kCount) {}
    constexpr const std::int32_t* begin() const { return first; }
    constexpr const std::int32_t* end() const { return last; }
};

// One operator of acmix/operators.h.
struct Definition {
    const char* op_type;
    const char* version;
    IntAttribute num_heads;
    IntAttribute kernel_size;
    IntAttribute stride;
    FloatAttribute scale;
    Choices kernel_sizes;
    Choices strides;
};

using Fields = std::array<nvinfer1::PluginField, 4>;

// The operator's fields, pointing into `attributes`, or without data where that is null.
Fields fields_of(const Definition&, const Attributes* attributes) noexcept;

// Throws std::runtime_error for attributes that the definition does not allow.
void check(const Definition&, const Attributes&);

// Checked attributes of a node in a network; a missing one takes the definition's default.
Attributes read_node(const Definition&, const nvinfer1::PluginFieldCollection*);

// Checked attributes of a plugin in an engine file; none may miss, and the field kPlanField must be kPlanVersion.
Attributes read_plan(const Definition&, const nvinfer1::PluginFieldCollection*);

}  // namespace acmix::tensorrt
