// Attributes of a node or of a plugin in an engine file, as TensorRT hands them over. They are those fields of a
// problem that are known before there are tensors.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "acmix/launch.h"
#include "log.h"

namespace acmix::tensorrt {

// What an engine file keeps of a plugin has this version; a plugin of another one is refused.
inline constexpr std::int32_t kPlanVersion = 1;
inline constexpr const char* kPlanField = "acmix_plan";

template <class T>
constexpr nvinfer1::PluginFieldType kFieldType =
    std::is_integral_v<T> ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;

template <class Problem>
inline constexpr std::size_t kAttributes = std::tuple_size_v<decltype(Definition<Problem>::kAttributes)>;

template <class Problem>
using Fields = std::array<nvinfer1::PluginField, kAttributes<Problem>>;

// The operator's fields, pointing into `attributes`, or without data where that is null.
template <class Problem>
Fields<Problem> fields_of(const Problem* attributes) noexcept {
    Fields<Problem> fields;
    nvinfer1::PluginField* field = fields.data();
    for_each_attribute<Problem>([&](const auto& attribute) {
        const auto type = kFieldType<decltype(attribute.fallback)>;
        *field++ = {attribute.name, attributes ? &(attributes->*attribute.at) : nullptr, type, 1};
    });
    return fields;
}

// Throws std::runtime_error with find()'s reason where no entry runs the problem.
template <class Problem>
void expect_entry(const Problem& problem) {
    const Found<Problem> found = find(problem);
    if (found.entry == nullptr) refuse(found.reason);
}

// Throws std::runtime_error for attributes that the definition does not allow.
template <class Problem>
void check(const Problem& attributes) {
    for_each_attribute<Problem>([&](const auto& attribute) {
        const auto value = attributes.*attribute.at;
        if constexpr (std::is_floating_point_v<decltype(value)>) {
            if (!std::isfinite(value)) refuse(attribute.name, " = ", value, " is not a finite number");
        } else {
            if (value < attribute.minimum) refuse(attribute.name, " = ", value, " is below ", attribute.minimum);
        }
    });
    expect_entry(attributes);
}

// The value of a field; `fallback` where it is missing, or, where that is null too, std::runtime_error.
template <class T>
T read(const nvinfer1::PluginFieldCollection& fields, const char* name, const T* fallback) {
    const nvinfer1::PluginField* const end = fields.fields + fields.nbFields;
    const auto* const field = std::find_if(fields.fields, end, [name](const nvinfer1::PluginField& one) {
        return one.name != nullptr && std::strcmp(one.name, name) == 0;
    });
    if (field == end) {
        if (fallback == nullptr) refuse(name, " is missing");
        return *fallback;
    }
    if (field->type != kFieldType<T> || field->length != 1 || field->data == nullptr) {
        refuse(name, " must be one ", std::is_integral_v<T> ? "INT32" : "FLOAT32", ", got ", field->length,
               " of PluginFieldType ", static_cast<std::int32_t>(field->type));
    }
    T value;
    std::memcpy(&value, field->data, sizeof value);
    return value;
}

template <class Problem>
Problem read_attributes(const nvinfer1::PluginFieldCollection& fields, bool with_defaults) {
    Problem attributes{};
    for_each_attribute<Problem>([&](const auto& attribute) {
        attributes.*attribute.at = read(fields, attribute.name, with_defaults ? &attribute.fallback : nullptr);
    });
    check(attributes);
    return attributes;
}

// Checked attributes of a node in a network; a missing one takes the definition's default.
template <class Problem>
Problem read_node(const nvinfer1::PluginFieldCollection* fields) {
    return read_attributes<Problem>(fields ? *fields : nvinfer1::PluginFieldCollection{}, true);
}

// Checked attributes of a plugin in an engine file; none may miss, and the field kPlanField must be kPlanVersion.
template <class Problem>
Problem read_plan(const nvinfer1::PluginFieldCollection* fields) {
    const nvinfer1::PluginFieldCollection given = fields ? *fields : nvinfer1::PluginFieldCollection{};
    const std::int32_t version = read<std::int32_t>(given, kPlanField, nullptr);
    if (version != kPlanVersion) refuse(kPlanField, " = ", version, ", this library reads ", kPlanVersion);
    return read_attributes<Problem>(given, false);
}

}  // namespace acmix::tensorrt
