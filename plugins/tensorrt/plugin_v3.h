// IPluginV3, the interface of TensorRT 10 and 11.
#pragma once

#include <NvInfer.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "operator.h"

namespace acmix::tensorrt {

inline constexpr const char* kInterface = "IPluginV3";
using CreatorInterface = nvinfer1::IPluginCreatorInterface;

// One node of an Operator. Methods return nonzero or null after logging one sentence where something does not fit.
template <class Operator>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
    explicit Plugin(const Attributes& attributes);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

    std::int32_t getNbOutputs() const noexcept override;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t output_count,
                                    const nvinfer1::DataType* inputs, std::int32_t input_count) const noexcept override;
    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                                 const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_input_count,
                                 nvinfer1::DimsExprs* outputs, std::int32_t output_count,
                                 nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   std::int32_t input_count, std::int32_t output_count) noexcept override;
    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs,
                                 std::int32_t output_count) noexcept override;
    const char* getTimingCacheID() noexcept override;

    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::PluginTensorDesc* outputs, std::int32_t output_count) noexcept override;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                         const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                         void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
    Attributes attributes_;
    std::string timing_cache_id_;
    std::array<nvinfer1::PluginField, std::tuple_size_v<Fields> + 1> plan_fields_;
    nvinfer1::PluginFieldCollection plan_;
};

template <class Operator>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection*,
                                      nvinfer1::TensorRTPhase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

 private:
    Fields fields_ = fields_of(Operator::kDefinition, nullptr);
    nvinfer1::PluginFieldCollection names_{static_cast<std::int32_t>(fields_.size()), fields_.data()};
};

}  // namespace acmix::tensorrt
