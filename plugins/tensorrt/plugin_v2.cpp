#include <NvInfer.h>

#if NV_TENSORRT_MAJOR < 10

#include <cstring>
#include <utility>

#include "plugin_v2.h"

namespace acmix::tensorrt {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV2DynamicExt;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

namespace {

// What an engine file keeps of a plugin: 32-bit words, least significant byte first.
using Plan = std::array<std::uint32_t, 6>;
constexpr std::uint32_t kMagic = 0x584d4341;  // "ACMX"
constexpr std::size_t kPlanSize = sizeof(Plan);

void write_plan(const Attributes& attributes, unsigned char* bytes) noexcept {
    std::uint32_t scale;
    std::memcpy(&scale, &attributes.scale, sizeof scale);
    const Plan plan{kMagic,
                    static_cast<std::uint32_t>(kPlanVersion),
                    static_cast<std::uint32_t>(attributes.num_heads),
                    static_cast<std::uint32_t>(attributes.kernel_size),
                    static_cast<std::uint32_t>(attributes.stride),
                    scale};
    for (const std::uint32_t word : plan) {
        for (int shift = 0; shift < 32; shift += 8) *bytes++ = static_cast<unsigned char>(word >> shift);
    }
}

Attributes read_plan(const Definition& definition, const unsigned char* bytes, std::size_t size) {
    Plan plan{};
    if (bytes == nullptr || size < 2 * sizeof plan[0]) refuse("serialized plugin of ", size, " bytes is cut off");
    for (std::size_t i = 0; i < size && i < kPlanSize; ++i) {
        plan[i / 4] |= static_cast<std::uint32_t>(bytes[i]) << 8 * (i % 4);
    }
    if (plan[0] != kMagic) refuse("serialized plugin is not one of this library");
    if (plan[1] != kPlanVersion) refuse(kPlanField, " = ", plan[1], ", this library reads ", kPlanVersion);
    if (size != kPlanSize) refuse("serialized plugin has ", size, " bytes, not ", kPlanSize);
    Attributes attributes{static_cast<std::int32_t>(plan[2]), static_cast<std::int32_t>(plan[3]),
                          static_cast<std::int32_t>(plan[4]), 0};
    std::memcpy(&attributes.scale, &plan[5], sizeof attributes.scale);
    check(definition, attributes);
    return attributes;
}

}  // namespace

template <class Operator>
Plugin<Operator>::Plugin(const Attributes& attributes, std::string name_space)
    : attributes_(attributes), namespace_(std::move(name_space)) {}

template <class Operator>
const char* Plugin<Operator>::getPluginType() const noexcept {
    return Operator::kDefinition.op_type;
}

template <class Operator>
const char* Plugin<Operator>::getPluginVersion() const noexcept {
    return Operator::kDefinition.version;
}

template <class Operator>
std::int32_t Plugin<Operator>::getNbOutputs() const noexcept {
    return kOutputs;
}

template <class Operator>
std::int32_t Plugin<Operator>::initialize() noexcept {
    return 0;
}

template <class Operator>
void Plugin<Operator>::terminate() noexcept {}

template <class Operator>
std::size_t Plugin<Operator>::getSerializationSize() const noexcept {
    return kPlanSize;
}

template <class Operator>
void Plugin<Operator>::serialize(void* buffer) const noexcept {
    write_plan(attributes_, static_cast<unsigned char*>(buffer));
}

template <class Operator>
void Plugin<Operator>::destroy() noexcept {
    delete this;
}

template <class Operator>
void Plugin<Operator>::setPluginNamespace(const char* name) noexcept {
    guarded(getPluginType(), 0, [&] { return namespace_ = name, 0; });
}

template <class Operator>
const char* Plugin<Operator>::getPluginNamespace() const noexcept {
    return namespace_.c_str();
}

template <class Operator>
DataType Plugin<Operator>::getOutputDataType(std::int32_t, const DataType* inputs, std::int32_t) const noexcept {
    return inputs[0];
}

template <class Operator>
IPluginV2DynamicExt* Plugin<Operator>::clone() const noexcept {
    return guarded<Plugin*>(getPluginType(), nullptr, [&] { return new Plugin(*this); });
}

template <class Operator>
DimsExprs Plugin<Operator>::getOutputDimensions(std::int32_t, const DimsExprs* inputs, std::int32_t input_count,
                                                nvinfer1::IExprBuilder& builder) noexcept {
    DimsExprs invalid{};
    invalid.nbDims = -1;
    return guarded(getPluginType(), invalid, [&] {
        if (input_count != kInputs) refuse("got ", input_count, " inputs, not ", kInputs);
        return output_of<Operator>(attributes_, inputs, builder);
    });
}

template <class Operator>
bool Plugin<Operator>::supportsFormatCombination(std::int32_t position, const PluginTensorDesc* tensors, std::int32_t,
                                                 std::int32_t) noexcept {
    return guarded(getPluginType(), false, [&] { return supports<Operator>(attributes_, tensors, position); });
}

template <class Operator>
void Plugin<Operator>::configurePlugin(const DynamicPluginTensorDesc* inputs, std::int32_t,
                                       const DynamicPluginTensorDesc*, std::int32_t) noexcept {
    guarded(getPluginType(), 0, [&] {
        expect_profile<Operator>(attributes_, inputs);
        return 0;
    });
}

template <class Operator>
std::size_t Plugin<Operator>::getWorkspaceSize(const PluginTensorDesc*, std::int32_t, const PluginTensorDesc*,
                                               std::int32_t) const noexcept {
    return 0;
}

template <class Operator>
std::int32_t Plugin<Operator>::enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                                       const void* const* inputs, void* const* outputs, void*,
                                       cudaStream_t stream) noexcept {
    return guarded(getPluginType(), -1, [&] {
        acmix::tensorrt::enqueue<Operator>(attributes_, input_descriptions, inputs, outputs, stream);
        return 0;
    });
}

template <class Operator>
const char* Creator<Operator>::getPluginName() const noexcept {
    return Operator::kDefinition.op_type;
}

template <class Operator>
const char* Creator<Operator>::getPluginVersion() const noexcept {
    return Operator::kDefinition.version;
}

template <class Operator>
const PluginFieldCollection* Creator<Operator>::getFieldNames() noexcept {
    return &names_;
}

template <class Operator>
IPluginV2DynamicExt* Creator<Operator>::createPlugin(const char*, const PluginFieldCollection* fields) noexcept {
    return guarded<IPluginV2DynamicExt*>(getPluginName(), nullptr, [&] {
        return new Plugin<Operator>(read_node(Operator::kDefinition, fields), namespace_);
    });
}

template <class Operator>
IPluginV2DynamicExt* Creator<Operator>::deserializePlugin(const char*, const void* data, std::size_t size) noexcept {
    return guarded<IPluginV2DynamicExt*>(getPluginName(), nullptr, [&] {
        const auto* bytes = static_cast<const unsigned char*>(data);
        return new Plugin<Operator>(read_plan(Operator::kDefinition, bytes, size), namespace_);
    });
}

template <class Operator>
void Creator<Operator>::setPluginNamespace(const char* name) noexcept {
    guarded(getPluginName(), 0, [&] { return namespace_ = name, 0; });
}

template <class Operator>
const char* Creator<Operator>::getPluginNamespace() const noexcept {
    return namespace_.c_str();
}

template class Plugin<LocalAttentionOperator>;
template class Plugin<OutlookAttentionOperator>;
template class Creator<LocalAttentionOperator>;
template class Creator<OutlookAttentionOperator>;

}  // namespace acmix::tensorrt

#endif
