// The operators as both plugin interfaces see them: attributes and tensor descriptions become a problem for launch.h.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "acmix/launch.h"
#include "attributes.h"
#include "log.h"

namespace acmix::tensorrt {

inline constexpr std::int32_t kInputs = 2;
inline constexpr std::int32_t kOutputs = 1;

// Dimensions of the inputs, -1 where a size is not known yet, 0 dimensions where nothing is.
using InputDims = std::array<nvinfer1::Dims, kInputs>;

// Static description of AcmixLocalAttention, see acmix::LocalAttention for the tensors.
struct LocalAttentionOperator {
    using Problem = LocalAttention;
    static constexpr Definition kDefinition{local_attention::kOpType,
                                            local_attention::kVersion,
                                            local_attention::kNumHeads,
                                            local_attention::kKernelSize,
                                            local_attention::kStride,
                                            local_attention::kScale,
                                            Choices(local_attention::kKernelSizes),
                                            Choices(local_attention::kStrides)};

    // Throws std::runtime_error where the inputs do not fit each other or the attributes.
    static Problem problem(const Attributes&, Dtype, Layout, const InputDims&);

    static nvinfer1::DimsExprs output(const Attributes&, const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder&);
};

// Static description of AcmixOutlookAttention, see acmix::OutlookAttention for the tensors.
struct OutlookAttentionOperator {
    using Problem = OutlookAttention;
    static constexpr Definition kDefinition{outlook_attention::kOpType,
                                            outlook_attention::kVersion,
                                            outlook_attention::kNumHeads,
                                            outlook_attention::kKernelSize,
                                            outlook_attention::kStride,
                                            outlook_attention::kScale,
                                            Choices(outlook_attention::kKernelSizes),
                                            Choices(outlook_attention::kStrides)};

    // Throws std::runtime_error where the inputs do not fit each other or the attributes.
    static Problem problem(const Attributes&, Dtype, Layout, const InputDims&);

    static nvinfer1::DimsExprs output(const Attributes&, const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder&);
};

std::optional<Dtype> dtype_of(nvinfer1::DataType) noexcept;
std::optional<Layout> layout_of(nvinfer1::TensorFormat) noexcept;

// Throws std::runtime_error with find()'s reason where no entry runs the problem.
template <class Problem>
void expect_entry(const Problem& problem) {
    const Found<Problem> found = find(problem);
    if (found.entry == nullptr) refuse(found.reason);
}

// The problem that the inputs describe; throws std::runtime_error for types and shapes that do not fit.
template <class Operator>
typename Operator::Problem problem_of(const Attributes& attributes, const nvinfer1::PluginTensorDesc* inputs) {
    const std::optional<Dtype> dtype = dtype_of(inputs[0].type);
    const std::optional<Layout> layout = layout_of(inputs[0].format);
    if (!dtype || !layout) {
        refuse("unsupported: got DataType ", static_cast<std::int32_t>(inputs[0].type), " in TensorFormat ",
               static_cast<std::int32_t>(inputs[0].format));
    }
    return Operator::problem(attributes, *dtype, *layout, {inputs[0].dims, inputs[1].dims});
}

// Whether tensor `position` (inputs, then outputs) may have its type and format, given the tensors before it.
template <class Operator>
bool supports(const Attributes& attributes, const nvinfer1::PluginTensorDesc* tensors, std::int32_t position) {
    const nvinfer1::PluginTensorDesc& tensor = tensors[position];
    const std::optional<Dtype> dtype = dtype_of(tensor.type);
    const std::optional<Layout> layout = layout_of(tensors[0].format);
    if (!dtype || !layout || tensor.type != tensors[0].type) return false;
    const bool image = tensor.dims.nbDims == 4;
    if (tensor.format != (image ? tensors[0].format : nvinfer1::TensorFormat::kLINEAR)) return false;
    const InputDims known{tensors[0].dims, position > 0 ? tensors[1].dims : nvinfer1::Dims{}};
    return find(Operator::problem(attributes, *dtype, *layout, known)).entry != nullptr;
}

// Output dimensions; throws std::runtime_error for sizes, where they are known, that no entry supports.
template <class Operator>
nvinfer1::DimsExprs output_of(const Attributes& attributes, const nvinfer1::DimsExprs* inputs,
                              nvinfer1::IExprBuilder& builder) {
    InputDims known{};
    for (std::int32_t i = 0; i < kInputs; ++i) {
        if (inputs[i].nbDims < 1) refuse("input ", i, " has no or unknown dimensions");
        known[i].nbDims = inputs[i].nbDims;
        for (std::int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
            const nvinfer1::IDimensionExpr& size = *inputs[i].d[axis];
            known[i].d[axis] = size.isConstant() ? size.getConstantValue() : -1;
        }
    }
    // Types and formats are chosen later; every operator has this pair for all its sizes.
    expect_entry(Operator::problem(attributes, Dtype::kFloat32, Layout::kNchw, known));
    return Operator::output(attributes, inputs, builder);
}

// Throws std::runtime_error where no entry runs the inputs as they are described, or at the ends of their profile.
template <class Operator>
void expect_profile(const Attributes& attributes, const nvinfer1::DynamicPluginTensorDesc* inputs) {
    using Description = nvinfer1::DynamicPluginTensorDesc;
    nvinfer1::PluginTensorDesc described[kInputs] = {inputs[0].desc, inputs[1].desc};
    expect_entry(problem_of<Operator>(attributes, described));
    for (const auto bound : {&Description::min, &Description::max}) {
        for (std::int32_t i = 0; i < kInputs; ++i) described[i].dims = inputs[i].*bound;
        expect_entry(problem_of<Operator>(attributes, described));
    }
}

// Enqueues the operator on the stream. Throws std::runtime_error where it cannot; allocates nothing where it can.
template <class Operator>
void enqueue(const Attributes& attributes, const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs,
             void* const* outputs, cudaStream_t stream) {
    const std::string reason =
        launch(problem_of<Operator>(attributes, descriptions), inputs[0], inputs[1], outputs[0], stream);
    if (!reason.empty()) refuse(reason);
}

}  // namespace acmix::tensorrt
