#include "attributes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>
#include <string>
#include <type_traits>

#include "log.h"

namespace acmix::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

template <class T>
constexpr PluginFieldType kFieldType = PluginFieldType::kINT32;
template <>
constexpr PluginFieldType kFieldType<float> = PluginFieldType::kFLOAT32;
template <class T>
constexpr const char* kTypeName = "INT32";
template <>
constexpr const char* kTypeName<float> = "FLOAT32";

template <class T>
T read(const PluginFieldCollection& fields, const char* name, const T* fallback) {
    const PluginField* const end = fields.fields + fields.nbFields;
    const PluginField* const field = std::find_if(fields.fields, end, [name](const PluginField& f) {
        return f.name != nullptr && std::strcmp(f.name, name) == 0;
    });
    if (field == end) {
        if (fallback == nullptr) refuse(name, " is missing");
        return *fallback;
    }
    if (field->type != kFieldType<T> || field->length != 1 || field->data == nullptr) {
        refuse(name, " must be one ", kTypeName<T>, ", got ", field->length, " of PluginFieldType ",
               static_cast<std::int32_t>(field->type));
    }
    T value;
    std::memcpy(&value, field->data, sizeof value);
    return value;
}

void check_choice(const char* name, std::int32_t value, const Choices& choices) {
    if (std::find(choices.begin(), choices.end(), value) != choices.end()) return;
    std::ostringstream supported;
    for (const std::int32_t choice : choices) supported << (choice == *choices.begin() ? "" : ", ") << choice;
    refuse(name, " = ", value, " is not supported; supported: ", supported.str());
}

// visit(definition of an attribute, its value) for each attribute, in the order of the fields.
template <class AttributesOrConst, class Visit>
void for_each(const Definition& definition, AttributesOrConst& attributes, Visit visit) {
    visit(definition.num_heads, attributes.num_heads);
    visit(definition.kernel_size, attributes.kernel_size);
    visit(definition.stride, attributes.stride);
    visit(definition.scale, attributes.scale);
}

Attributes read(const Definition& definition, const PluginFieldCollection& fields, bool with_defaults) {
    Attributes attributes{};
    for_each(definition, attributes, [&](const auto& attribute, auto& value) {
        value = read(fields, attribute.name, with_defaults ? &attribute.fallback : nullptr);
    });
    check(definition, attributes);
    return attributes;
}

}  // namespace

Fields fields_of(const Definition& definition, const Attributes* attributes) noexcept {
    Fields fields;
    PluginField* field = fields.data();
    const Attributes none{};
    for_each(definition, attributes ? *attributes : none, [&](const auto& attribute, const auto& value) {
        using Value = std::decay_t<decltype(value)>;
        *field++ = PluginField(attribute.name, attributes ? &value : nullptr, kFieldType<Value>, 1);
    });
    return fields;
}

void check(const Definition& definition, const Attributes& attributes) {
    if (attributes.num_heads < definition.num_heads.minimum) {
        refuse(definition.num_heads.name, " = ", attributes.num_heads, " is below ", definition.num_heads.minimum);
    }
    check_choice(definition.kernel_size.name, attributes.kernel_size, definition.kernel_sizes);
    check_choice(definition.stride.name, attributes.stride, definition.strides);
    if (!std::isfinite(attributes.scale)) {
        refuse(definition.scale.name, " = ", attributes.scale, " is not a finite number");
    }
}

Attributes read_node(const Definition& definition, const PluginFieldCollection* fields) {
    return read(definition, fields ? *fields : PluginFieldCollection{}, true);
}

Attributes read_plan(const Definition& definition, const PluginFieldCollection* fields) {
    const PluginFieldCollection given = fields ? *fields : PluginFieldCollection{};
    const std::int32_t version = read<std::int32_t>(given, kPlanField, nullptr);
    if (version != kPlanVersion) refuse(kPlanField, " = ", version, ", this library reads ", kPlanVersion);
    return read(definition, given, false);
}

}  // namespace acmix::tensorrt
