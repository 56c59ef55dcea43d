#include <NvInfer.h>

#if NV_TENSORRT_MAJOR >= 10

#include <algorithm>
#include <cstdio>

#include "plugin_v3.h"

namespace acmix::tensorrt {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

std::string timing_cache_id(const Attributes& attributes) {
    char id[80];
    std::snprintf(id, sizeof id, "%d_%d_%d_%a", attributes.num_heads, attributes.kernel_size, attributes.stride,
                  static_cast<double>(attributes.scale));
    return id;
}

}  // namespace

template <class Operator>
Plugin<Operator>::Plugin(const Attributes& attributes)
    : attributes_(attributes), timing_cache_id_(timing_cache_id(attributes)) {}

template <class Operator>
nvinfer1::IPluginCapability* Plugin<Operator>::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

template <class Operator>
IPluginV3* Plugin<Operator>::clone() noexcept {
    return guarded<IPluginV3*>(getPluginName(), nullptr, [&] { return new Plugin(*this); });
}

template <class Operator>
const char* Plugin<Operator>::getPluginName() const noexcept {
    return Operator::kDefinition.op_type;
}

template <class Operator>
const char* Plugin<Operator>::getPluginVersion() const noexcept {
    return Operator::kDefinition.version;
}

template <class Operator>
const char* Plugin<Operator>::getPluginNamespace() const noexcept {
    return "";
}

template <class Operator>
std::int32_t Plugin<Operator>::getNbOutputs() const noexcept {
    return kOutputs;
}

template <class Operator>
std::int32_t Plugin<Operator>::getOutputDataTypes(DataType* outputs, std::int32_t, const DataType* inputs,
                                                  std::int32_t) const noexcept {
    outputs[0] = inputs[0];
    return 0;
}

template <class Operator>
std::int32_t Plugin<Operator>::getOutputShapes(const DimsExprs* inputs, std::int32_t input_count, const DimsExprs*,
                                               std::int32_t, DimsExprs* outputs, std::int32_t,
                                               nvinfer1::IExprBuilder& builder) noexcept {
    return guarded(getPluginName(), -1, [&] {
        if (input_count != kInputs) refuse("got ", input_count, " inputs, not ", kInputs);
        outputs[0] = output_of<Operator>(attributes_, inputs, builder);
        return 0;
    });
}

template <class Operator>
bool Plugin<Operator>::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                                 std::int32_t, std::int32_t) noexcept {
    return guarded(getPluginName(), false, [&] {
        std::array<PluginTensorDesc, kInputs + kOutputs> known{};
        for (std::int32_t i = 0; i <= position; ++i) known[i] = tensors[i].desc;
        return supports<Operator>(attributes_, known.data(), position);
    });
}

template <class Operator>
std::int32_t Plugin<Operator>::configurePlugin(const DynamicPluginTensorDesc* inputs, std::int32_t,
                                               const DynamicPluginTensorDesc*, std::int32_t) noexcept {
    return guarded(getPluginName(), -1, [&] {
        expect_profile<Operator>(attributes_, inputs);
        return 0;
    });
}

template <class Operator>
const char* Plugin<Operator>::getTimingCacheID() noexcept {
    return timing_cache_id_.c_str();
}

template <class Operator>
std::int32_t Plugin<Operator>::onShapeChange(const PluginTensorDesc* inputs, std::int32_t, const PluginTensorDesc*,
                                             std::int32_t) noexcept {
    return guarded(getPluginName(), -1, [&] {
        expect_entry(problem_of<Operator>(attributes_, inputs));
        return 0;
    });
}

template <class Operator>
std::int32_t Plugin<Operator>::enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                                       const void* const* inputs, void* const* outputs, void*,
                                       cudaStream_t stream) noexcept {
    return guarded(getPluginName(), -1, [&] {
        acmix::tensorrt::enqueue<Operator>(attributes_, input_descriptions, inputs, outputs, stream);
        return 0;
    });
}

template <class Operator>
IPluginV3* Plugin<Operator>::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return clone();
}

template <class Operator>
const PluginFieldCollection* Plugin<Operator>::getFieldsToSerialize() noexcept {
    const Fields fields = fields_of(Operator::kDefinition, &attributes_);
    plan_fields_[0] = PluginField(kPlanField, &kPlanVersion, PluginFieldType::kINT32, 1);
    std::copy(fields.begin(), fields.end(), plan_fields_.begin() + 1);
    plan_ = {static_cast<std::int32_t>(plan_fields_.size()), plan_fields_.data()};
    return &plan_;
}

template <class Operator>
IPluginV3* Creator<Operator>::createPlugin(const char*, const PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase phase) noexcept {
    return guarded<IPluginV3*>(getPluginName(), nullptr, [&] {
        const bool is_node = phase == nvinfer1::TensorRTPhase::kBUILD;
        const auto read = is_node ? read_node : read_plan;
        return new Plugin<Operator>(read(Operator::kDefinition, fields));
    });
}

template <class Operator>
const PluginFieldCollection* Creator<Operator>::getFieldNames() noexcept {
    return &names_;
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
const char* Creator<Operator>::getPluginNamespace() const noexcept {
    return "";
}

template class Plugin<LocalAttentionOperator>;
template class Plugin<OutlookAttentionOperator>;
template class Creator<LocalAttentionOperator>;
template class Creator<OutlookAttentionOperator>;

}  // namespace acmix::tensorrt

#endif
