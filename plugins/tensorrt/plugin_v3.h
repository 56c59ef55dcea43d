// IPluginV3, the interface of TensorRT 10 and 11.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

#include "operator.h"

namespace acmix::tensorrt {

inline constexpr const char* kInterface = "IPluginV3";
using CreatorInterface = nvinfer1::IPluginCreatorInterface;

// Whatever decides how fast a node is beside its tensors: the kernels and the attributes.
template <class Problem>
std::string timing_cache_id(const Problem& attributes) {
    std::string id = sources();
    for_each_attribute<Problem>([&](const auto& attribute) {
        char value[32];
        if constexpr (std::is_integral_v<decltype(attribute.fallback)>) {
            std::snprintf(value, sizeof value, "%d", attributes.*attribute.at);
        } else {
            std::snprintf(value, sizeof value, "%a", static_cast<double>(attributes.*attribute.at));
        }
        id += "_" + std::string(value);
    });
    return id;
}

// One node of an operator. Methods return nonzero or null after logging one sentence where something does not fit.
template <class Problem>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
    explicit Plugin(const Problem& attributes)
        : attributes_(attributes), timing_cache_id_(timing_cache_id(attributes)) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded<nvinfer1::IPluginV3*>(getPluginName(), nullptr, [&] { return new Plugin(*this); });
    }

    const char* getPluginName() const noexcept override { return Definition<Problem>::kOpType; }
    const char* getPluginVersion() const noexcept override { return Definition<Problem>::kVersion; }
    const char* getPluginNamespace() const noexcept override { return ""; }
    std::int32_t getNbOutputs() const noexcept override { return kOutputs; }

    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t, const nvinfer1::DataType* inputs,
                                    std::int32_t) const noexcept override {
        outputs[0] = inputs[0];
        return 0;
    }

    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                                 const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* outputs, std::int32_t,
                                 nvinfer1::IExprBuilder& builder) noexcept override {
        return guarded(getPluginName(), -1,
                       [&] { return outputs[0] = output_of(attributes_, inputs, input_count, builder), 0; });
    }

    bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   std::int32_t, std::int32_t) noexcept override {
        return guarded(getPluginName(), false, [&] {
            std::array<nvinfer1::PluginTensorDesc, kInputs<Problem> + kOutputs> known{};
            for (std::int32_t i = 0; i <= position; ++i) known[i] = tensors[i].desc;
            return supports(attributes_, known.data(), position);
        });
    }

    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t,
                                 const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) noexcept override {
        return guarded(getPluginName(), -1, [&] { return expect_profile(attributes_, inputs), 0; });
    }

    const char* getTimingCacheID() noexcept override { return timing_cache_id_.c_str(); }

    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t,
                               const nvinfer1::PluginTensorDesc*, std::int32_t) noexcept override {
        return guarded(getPluginName(), -1, [&] { return expect_entry(problem_of(attributes_, inputs)), 0; });
    }

    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions, const nvinfer1::PluginTensorDesc*,
                         const void* const* inputs, void* const* outputs, void*,
                         cudaStream_t stream) noexcept override {
        return guarded(getPluginName(), -1, [&] {
            return acmix::tensorrt::enqueue(attributes_, input_descriptions, inputs, outputs, stream), 0;
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        const Fields<Problem> fields = fields_of(&attributes_);
        plan_fields_[0] = {kPlanField, &kPlanVersion, nvinfer1::PluginFieldType::kINT32, 1};
        std::copy(fields.begin(), fields.end(), plan_fields_.begin() + 1);
        plan_ = {static_cast<std::int32_t>(plan_fields_.size()), plan_fields_.data()};
        return &plan_;
    }

 private:
    Problem attributes_;
    std::string timing_cache_id_;
    std::array<nvinfer1::PluginField, 1 + kAttributes<Problem>> plan_fields_;
    nvinfer1::PluginFieldCollection plan_;
};

template <class Problem>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(getPluginName(), nullptr, [&] {
            const bool is_node = phase == nvinfer1::TensorRTPhase::kBUILD;
            return new Plugin<Problem>(is_node ? read_node<Problem>(fields) : read_plan<Problem>(fields));
        });
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
    const char* getPluginName() const noexcept override { return Definition<Problem>::kOpType; }
    const char* getPluginVersion() const noexcept override { return Definition<Problem>::kVersion; }
    const char* getPluginNamespace() const noexcept override { return ""; }

 private:
    Fields<Problem> fields_ = fields_of<Problem>(nullptr);
    nvinfer1::PluginFieldCollection names_{static_cast<std::int32_t>(fields_.size()), fields_.data()};
};

}  // namespace acmix::tensorrt
