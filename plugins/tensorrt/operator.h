// The operators as both plugin interfaces see them: attributes and tensor descriptions become a problem for launch.h.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "attributes.h"

namespace acmix::tensorrt {

template <class Problem>
inline constexpr std::int32_t kInputs = std::size(Definition<Problem>::kInputs);
inline constexpr std::int32_t kOutputs = 1;

// Dimensions of the inputs, -1 where a size is not known yet, 0 dimensions where nothing is.
template <class Problem>
using InputDims = std::array<nvinfer1::Dims, kInputs<Problem>>;

inline std::optional<Dtype> dtype_of(nvinfer1::DataType type) noexcept {
    if (type == nvinfer1::DataType::kFLOAT) return Dtype::kFloat32;
    if (type == nvinfer1::DataType::kHALF) return Dtype::kFloat16;
    return std::nullopt;
}

inline std::optional<Layout> layout_of(nvinfer1::TensorFormat format) noexcept {
    if (format == nvinfer1::TensorFormat::kLINEAR) return Layout::kNchw;
    if (format == nvinfer1::TensorFormat::kHWC8) return Layout::kNhwc;
    return std::nullopt;
}

// A size that can be told from the length of an axis, and the number of parts that it is of it.
template <class Problem>
struct Solvable {
    Member<Problem> size = nullptr;
    std::int64_t parts = 0;  // 0: none
};

template <class Problem>
Solvable<Problem> solvable(const Axis<Problem>& axis, Problem known) {
    Solvable<Problem> found;
    for (const Factor<Problem>& factor : axis) {
        if (factor.power < 0) return {};
        if (known.*factor.size == 0 && factor.power == 1) found.size = factor.size;
    }
    if (found.size == nullptr || axis.divisor != 1 || axis.less != 0) return {};
    known.*found.size = 1;
    found.parts = length(axis, known);
    return found;
}

// The attributes with the sizes that the inputs have. Throws std::runtime_error where inputs do not fit.
template <class Problem>
Problem problem_of(Problem problem, Dtype dtype, Layout layout, const InputDims<Problem>& inputs) {
    problem.dtype = dtype;
    problem.layout = layout;
    const auto for_each_axis = [&](auto visit) {
        for (std::int32_t i = 0; i < kInputs<Problem>; ++i) {
            const auto& [name, axes] = Definition<Problem>::kInputs[i];
            const auto rank = static_cast<std::int32_t>(axes.size);
            if (inputs[i].nbDims < 1) continue;
            if (inputs[i].nbDims != rank) refuse(name, " has ", inputs[i].nbDims, " dimensions, not ", rank);
            for (std::int32_t axis = 0; axis < rank; ++axis) {
                const std::int64_t size = inputs[i].d[axis];
                if (size > 0) visit(axes.first[axis], name, axis, size);
            }
        }
    };
    for_each_axis([&](const Axis<Problem>& axis, const char* name, std::int32_t at, std::int64_t size) {
        if (size > std::numeric_limits<std::int32_t>::max()) refuse(name, " is too large: ", size, " at axis ", at);
        const Solvable<Problem> found = solvable(axis, problem);
        if (found.parts == 0) return;
        if (size % found.parts != 0)
            refuse(name, " has size ", size, " at axis ", at, ", not a multiple of ", found.parts);
        problem.*found.size = static_cast<std::int32_t>(size / found.parts);
    });
    for_each_axis([&](const Axis<Problem>& axis, const char* name, std::int32_t at, std::int64_t size) {
        const std::int64_t expected = length(axis, problem);
        if (expected > 0 && size != expected) refuse(name, " has size ", size, " at axis ", at, ", not ", expected);
    });
    return problem;
}

// The problem that the inputs describe; throws std::runtime_error for types and shapes that do not fit.
template <class Problem>
Problem problem_of(const Problem& attributes, const nvinfer1::PluginTensorDesc* inputs) {
    const std::optional<Dtype> dtype = dtype_of(inputs[0].type);
    const std::optional<Layout> layout = layout_of(inputs[0].format);
    if (!dtype || !layout) {
        refuse("unsupported: got DataType ", static_cast<std::int32_t>(inputs[0].type), " in TensorFormat ",
               static_cast<std::int32_t>(inputs[0].format));
    }
    InputDims<Problem> dims;
    for (std::int32_t i = 0; i < kInputs<Problem>; ++i) dims[i] = inputs[i].dims;
    return problem_of(attributes, *dtype, *layout, dims);
}

// Whether tensor `position` (inputs, then outputs) may have its type and format, given the tensors before it.
template <class Problem>
bool supports(const Problem& attributes, const nvinfer1::PluginTensorDesc* tensors, std::int32_t position) {
    const nvinfer1::PluginTensorDesc& tensor = tensors[position];
    const std::optional<Dtype> dtype = dtype_of(tensor.type);
    const std::optional<Layout> layout = layout_of(tensors[0].format);
    if (!dtype || !layout || tensor.type != tensors[0].type) return false;
    const bool image = tensor.dims.nbDims == 4;
    if (tensor.format != (image ? tensors[0].format : nvinfer1::TensorFormat::kLINEAR)) return false;
    InputDims<Problem> known{};
    for (std::int32_t i = 0; i < kInputs<Problem> && i <= position; ++i) known[i] = tensors[i].dims;
    return find(problem_of(attributes, *dtype, *layout, known)).entry != nullptr;
}

// Lengths as expressions in the dimensions of the inputs.
template <class Problem>
class Expressions {
 public:
    using Expression = const nvinfer1::IDimensionExpr*;
    using Operation = nvinfer1::DimensionOperation;

    Expressions(const Problem& attributes, const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder& builder)
        : attributes_(attributes), inputs_(inputs), builder_(builder) {}

    Expression length(const Axis<Problem>& axis) const {
        if (const Expression same = find_input([&](const Axis<Problem>& one, Expression given) -> Expression {
                return std::string_view(one.text) == axis.text ? given : nullptr;
            })) {
            return same;
        }
        Expression over = constant(axis.coefficient), under = constant(axis.divisor);
        for (const Factor<Problem>& factor : axis) {
            Expression& product = factor.power > 0 ? over : under;
            for (int i = 0; i < std::abs(factor.power); ++i) {
                product = apply(Operation::kPROD, size(factor.size), product);
            }
        }
        const Expression all = apply(axis.rounds_up ? Operation::kCEIL_DIV : Operation::kFLOOR_DIV, over, under);
        return axis.less == 0 ? all : builder_.operation(Operation::kSUB, *all, *constant(axis.less));
    }

 private:
    // What `visit` makes of the first axis of the inputs for which it makes something.
    template <class Visit>
    Expression find_input(Visit visit) const {
        for (std::int32_t i = 0; i < kInputs<Problem>; ++i) {
            const Expression* given = inputs_[i].d;
            for (const Axis<Problem>& axis : Definition<Problem>::kInputs[i].axes) {
                if (const Expression found = visit(axis, *given++)) return found;
            }
        }
        return nullptr;
    }

    Expression size(Member<Problem> size) const {
        if (attributes_.*size > 0) return constant(attributes_.*size);
        return find_input([&](const Axis<Problem>& axis, Expression given) -> Expression {
            const Solvable<Problem> found = solvable(axis, attributes_);
            if (found.parts == 0 || found.size != size) return nullptr;
            return apply(Operation::kFLOOR_DIV, given, constant(found.parts));
        });
    }

    Expression constant(std::int64_t value) const { return builder_.constant(static_cast<std::int32_t>(value)); }

    // A product or a quotient.
    Expression apply(Operation operation, Expression first, Expression second) const {
        if (second->isConstant() && second->getConstantValue() == 1) return first;
        return builder_.operation(operation, *first, *second);
    }

    const Problem& attributes_;
    const nvinfer1::DimsExprs* inputs_;
    nvinfer1::IExprBuilder& builder_;
};

// Output dimensions; throws std::runtime_error for sizes, where they are known, that no entry supports.
template <class Problem>
nvinfer1::DimsExprs output_of(const Problem& attributes, const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                              nvinfer1::IExprBuilder& builder) {
    if (input_count != kInputs<Problem>) refuse("got ", input_count, " inputs, not ", kInputs<Problem>);
    InputDims<Problem> known{};
    for (std::int32_t i = 0; i < input_count; ++i) {
        if (inputs[i].nbDims < 1) refuse("input ", i, " has no or unknown dimensions");
        known[i].nbDims = inputs[i].nbDims;
        for (std::int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
            const nvinfer1::IDimensionExpr& size = *inputs[i].d[axis];
            known[i].d[axis] = size.isConstant() ? size.getConstantValue() : -1;
        }
    }
    // Types and formats are chosen later; every operator has this pair for all its sizes.
    expect_entry(problem_of(attributes, Dtype::kFloat32, Layout::kNchw, known));
    const Expressions<Problem> expressions(attributes, inputs, builder);
    nvinfer1::DimsExprs y{};
    for (const Axis<Problem>& axis : Definition<Problem>::kOutputs[0].axes) {
        y.d[y.nbDims++] = expressions.length(axis);
    }
    return y;
}

// Throws std::runtime_error where no entry runs the inputs as they are described, or at the ends of their profile.
template <class Problem>
void expect_profile(const Problem& attributes, const nvinfer1::DynamicPluginTensorDesc* inputs) {
    using Description = nvinfer1::DynamicPluginTensorDesc;
    nvinfer1::PluginTensorDesc described[kInputs<Problem>];
    for (std::int32_t i = 0; i < kInputs<Problem>; ++i) described[i] = inputs[i].desc;
    expect_entry(problem_of(attributes, described));
    for (const auto bound : {&Description::min, &Description::max}) {
        for (std::int32_t i = 0; i < kInputs<Problem>; ++i) described[i].dims = inputs[i].*bound;
        expect_entry(problem_of(attributes, described));
    }
}

// Enqueues the operator on the stream. Throws std::runtime_error where it cannot; allocates nothing where it can.
template <class Problem>
void enqueue(const Problem& attributes, const nvinfer1::PluginTensorDesc* descriptions, const void* const* inputs,
             void* const* outputs, cudaStream_t stream) {
    const std::string reason = launch(problem_of(attributes, descriptions), inputs, outputs[0], stream);
    if (!reason.empty()) refuse(reason);
}

}  // namespace acmix::tensorrt
