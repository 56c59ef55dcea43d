// IPluginV2DynamicExt, the interface of TensorRT 8.5 and 8.6.
#pragma once

#include <NvInfer.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "operator.h"

namespace acmix::tensorrt {

inline constexpr const char* kInterface = "IPluginV2DynamicExt";
using CreatorInterface = nvinfer1::IPluginCreator;

// One node of an Operator. Methods fail as TensorRT wants it, after logging one sentence, where something does not fit.
template <class Operator>
class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
    explicit Plugin(const Attributes& attributes, std::string name_space);

    const char* getPluginType() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    std::int32_t getNbOutputs() const noexcept override;
    std::int32_t initialize() noexcept override;
    void terminate() noexcept override;
    std::size_t getSerializationSize() const noexcept override;
    void serialize(void* buffer) const noexcept override;
    void destroy() noexcept override;
    void setPluginNamespace(const char*) noexcept override;
    const char* getPluginNamespace() const noexcept override;

    nvinfer1::DataType getOutputDataType(std::int32_t index, const nvinfer1::DataType* inputs,
                                         std::int32_t input_count) const noexcept override;

    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override;
    nvinfer1::DimsExprs getOutputDimensions(std::int32_t index, const nvinfer1::DimsExprs* inputs,
                                            std::int32_t input_count, nvinfer1::IExprBuilder&) noexcept override;
    bool supportsFormatCombination(std::int32_t position, const nvinfer1::PluginTensorDesc* tensors,
                                   std::int32_t input_count, std::int32_t output_count) noexcept override;
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                         const nvinfer1::DynamicPluginTensorDesc* outputs, std::int32_t output_count) noexcept override;
    std::size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                                 const nvinfer1::PluginTensorDesc* outputs,
                                 std::int32_t output_count) const noexcept override;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                         const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                         void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;

 private:
    Attributes attributes_;
    std::string namespace_;
};

template <class Operator>
class Creator final : public nvinfer1::IPluginCreator {
 public:
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
    nvinfer1::IPluginV2DynamicExt* createPlugin(const char* name,
                                                const nvinfer1::PluginFieldCollection*) noexcept override;
    nvinfer1::IPluginV2DynamicExt* deserializePlugin(const char* name, const void* data,
                                                     std::size_t size) noexcept override;
    void setPluginNamespace(const char*) noexcept override;
    const char* getPluginNamespace() const noexcept override;

 private:
    std::string namespace_;
    Fields fields_ = fields_of(Operator::kDefinition, nullptr);
    nvinfer1::PluginFieldCollection names_{static_cast<std::int32_t>(fields_.size()), fields_.data()};
};

}  // namespace acmix::tensorrt
