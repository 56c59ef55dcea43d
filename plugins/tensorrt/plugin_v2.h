// IPluginV2DynamicExt, the interface of TensorRT 8.5 and 8.6.
#pragma once

#include <NvInfer.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "operator.h"

namespace acmix::tensorrt {

inline constexpr const char* kInterface = "IPluginV2DynamicExt";
using CreatorInterface = nvinfer1::IPluginCreator;

// What an engine file keeps of a plugin: 32-bit words, least significant byte first; kMagic, the version, attributes.
template <class Problem>
using Plan = std::array<std::uint32_t, 2 + kAttributes<Problem>>;
inline constexpr std::uint32_t kMagic = 0x584d4341;  // "ACMX"

template <class Problem>
void write_plan(const Problem& attributes, unsigned char* bytes) noexcept {
    Plan<Problem> plan{kMagic, static_cast<std::uint32_t>(kPlanVersion)};
    std::uint32_t* word = plan.data() + 2;
    for_each_attribute<Problem>(
        [&](const auto& attribute) { std::memcpy(word++, &(attributes.*attribute.at), sizeof *word); });
    for (const std::uint32_t one : plan) {
        for (int shift = 0; shift < 32; shift += 8) *bytes++ = static_cast<unsigned char>(one >> shift);
    }
}

template <class Problem>
Problem read_plan(const unsigned char* bytes, std::size_t size) {
    Plan<Problem> plan{};
    if (bytes == nullptr || size < 2 * sizeof plan[0]) refuse("serialized plugin of ", size, " bytes is cut off");
    for (std::size_t i = 0; i < size && i < sizeof plan; ++i) {
        plan[i / 4] |= static_cast<std::uint32_t>(bytes[i]) << 8 * (i % 4);
    }
    if (plan[0] != kMagic) refuse("serialized plugin is not one of this library");
    if (plan[1] != kPlanVersion) refuse(kPlanField, " = ", plan[1], ", this library reads ", kPlanVersion);
    if (size != sizeof plan) refuse("serialized plugin has ", size, " bytes, not ", sizeof plan);
    Problem attributes{};
    const std::uint32_t* word = plan.data() + 2;
    for_each_attribute<Problem>(
        [&](const auto& attribute) { std::memcpy(&(attributes.*attribute.at), word++, sizeof *word); });
    check(attributes);
    return attributes;
}

// One node of an operator. Methods fail as TensorRT wants it, after logging one sentence, where something does not fit.
template <class Problem>
class Plugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
    explicit Plugin(const Problem& attributes, std::string name_space)
        : attributes_(attributes), namespace_(std::move(name_space)) {}

    const char* getPluginType() const noexcept override { return Definition<Problem>::kOpType; }
    const char* getPluginVersion() const noexcept override { return Definition<Problem>::kVersion; }
    std::int32_t getNbOutputs() const noexcept override { return kOutputs; }
    std::int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    std::size_t getSerializationSize() const noexcept override { return sizeof(Plan<Problem>); }
    void serialize(void* buffer) const noexcept override {
        write_plan(attributes_, static_cast<unsigned char*>(buffer));
    }
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(const char* name) noexcept override {
        guarded(getPluginType(), 0, [&] { return namespace_ = name ? name : "", 0; });
    }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    nvinfer1::DataType getOutputDataType(std::int32_t, const nvinfer1::DataType* inputs,
                                         std::int32_t) const noexcept override {
        return inputs[0];
    }

    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
        return guarded<Plugin*>(getPluginType(), nullptr, [&] { return new Plugin(*this); });
    }

    nvinfer1::DimsExprs getOutputDimensions(std::int32_t, const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                                            nvinfer1::IExprBuilder& builder) noexcept override {
        nvinfer1::DimsExprs invalid{};
        invalid.nbDims = -1;
        return guarded(getPluginType(), invalid, [&] { return output_of(attributes_, inputs, input_count, builder); });
    }

    bool supportsFormatCombination(std::int32_t position, const nvinfer1::PluginTensorDesc* tensors, std::int32_t,
                                   std::int32_t) noexcept override {
        return guarded(getPluginType(), false, [&] { return supports(attributes_, tensors, position); });
    }

    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t,
                         const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) noexcept override {
        guarded(getPluginType(), 0, [&] { return expect_profile(attributes_, inputs), 0; });
    }

    std::size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, std::int32_t, const nvinfer1::PluginTensorDesc*,
                                 std::int32_t) const noexcept override {
        return 0;
    }

    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions, const nvinfer1::PluginTensorDesc*,
                         const void* const* inputs, void* const* outputs, void*,
                         cudaStream_t stream) noexcept override {
        return guarded(getPluginType(), -1, [&] {
            return acmix::tensorrt::enqueue(attributes_, input_descriptions, inputs, outputs, stream), 0;
        });
    }

 private:
    Problem attributes_;
    std::string namespace_;
};

template <class Problem>
class Creator final : public nvinfer1::IPluginCreator {
 public:
    const char* getPluginName() const noexcept override { return Definition<Problem>::kOpType; }
    const char* getPluginVersion() const noexcept override { return Definition<Problem>::kVersion; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }

    nvinfer1::IPluginV2DynamicExt* createPlugin(const char*,
                                                const nvinfer1::PluginFieldCollection* fields) noexcept override {
        return guarded<nvinfer1::IPluginV2DynamicExt*>(
            getPluginName(), nullptr, [&] { return new Plugin<Problem>(read_node<Problem>(fields), namespace_); });
    }

    nvinfer1::IPluginV2DynamicExt* deserializePlugin(const char*, const void* data,
                                                     std::size_t size) noexcept override {
        return guarded<nvinfer1::IPluginV2DynamicExt*>(getPluginName(), nullptr, [&] {
            const auto* bytes = static_cast<const unsigned char*>(data);
            return new Plugin<Problem>(read_plan<Problem>(bytes, size), namespace_);
        });
    }

    void setPluginNamespace(const char* name) noexcept override {
        guarded(getPluginName(), 0, [&] { return namespace_ = name ? name : "", 0; });
    }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
    std::string namespace_;
    Fields<Problem> fields_ = fields_of<Problem>(nullptr);
    nvinfer1::PluginFieldCollection names_{static_cast<std::int32_t>(fields_.size()), fields_.data()};
};

}  // namespace acmix::tensorrt
