#include "operator.h"

#include <limits>

namespace acmix::tensorrt {
namespace {

using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IExprBuilder;

// Sizes of a tensor, 0 where unknown.
class Sizes {
 public:
    Sizes(const char* name, const Dims& dims, std::int32_t rank) : name_(name), dims_(dims) {
        if (dims.nbDims > 0 && dims.nbDims != rank) refuse(name, " has ", dims.nbDims, " dimensions, not ", rank);
    }

    std::int32_t operator[](std::int32_t axis) const {
        if (axis >= dims_.nbDims || dims_.d[axis] < 0) return 0;
        const std::int64_t size = dims_.d[axis];
        if (size > std::numeric_limits<std::int32_t>::max()) refuse(name_, " is too large: ", size, " at axis ", axis);
        return static_cast<std::int32_t>(size);
    }

    // Channels divided by `parts`, which must leave no rest.
    std::int32_t channels_over(std::int64_t parts) const {
        const std::int32_t channels = (*this)[1];
        if (channels % parts != 0) refuse(name_, " has ", channels, " channels, not a multiple of ", parts);
        return static_cast<std::int32_t>(channels / parts);
    }

    void expect(std::int32_t axis, std::int64_t size) const {
        const std::int32_t got = (*this)[axis];
        if (got > 0 && size > 0 && got != size) refuse(name_, " has size ", got, " at axis ", axis, ", not ", size);
    }

 private:
    const char* name_;
    const Dims& dims_;
};

}  // namespace

LocalAttention LocalAttentionOperator::problem(const Attributes& attributes, Dtype dtype, Layout layout,
                                               const InputDims& inputs) {
    const Sizes qkv("qkv", inputs[0], 4);
    const Sizes position_weight("position_weight", inputs[1], 2);
    const std::int32_t head_dim = qkv.channels_over(std::int64_t{3} * attributes.num_heads);
    position_weight.expect(0, head_dim);
    position_weight.expect(1, 2);
    return {dtype,
            layout,
            qkv[0],
            attributes.num_heads,
            head_dim,
            qkv[2],
            qkv[3],
            attributes.kernel_size,
            attributes.stride,
            attributes.scale};
}

DimsExprs LocalAttentionOperator::output(const Attributes& attributes, const DimsExprs* inputs, IExprBuilder& builder) {
    DimsExprs y = inputs[0];
    const auto divide = [&](std::int32_t axis, std::int32_t by) {
        y.d[axis] = builder.operation(DimensionOperation::kFLOOR_DIV, *y.d[axis], *builder.constant(by));
    };
    divide(1, 3);
    divide(2, attributes.stride);
    divide(3, attributes.stride);
    return y;
}

OutlookAttention OutlookAttentionOperator::problem(const Attributes& attributes, Dtype dtype, Layout layout,
                                                   const InputDims& inputs) {
    const Sizes logits("logits", inputs[0], 4);
    const Sizes values("values", inputs[1], 4);
    const std::int64_t window = std::int64_t{attributes.kernel_size} * attributes.kernel_size;
    const auto windows = [&](std::int32_t size) {
        return (std::int64_t{size} + attributes.stride - 1) / attributes.stride;
    };
    logits.expect(0, values[0]);
    logits.expect(1, attributes.num_heads * window * window);
    logits.expect(2, windows(values[2]));
    logits.expect(3, windows(values[3]));
    return {dtype,
            layout,
            values[0],
            attributes.num_heads,
            values.channels_over(attributes.num_heads),
            values[2],
            values[3],
            attributes.kernel_size,
            attributes.stride,
            attributes.scale};
}

DimsExprs OutlookAttentionOperator::output(const Attributes&, const DimsExprs* inputs, IExprBuilder&) {
    return inputs[1];
}

std::optional<Dtype> dtype_of(nvinfer1::DataType type) noexcept {
    if (type == nvinfer1::DataType::kFLOAT) return Dtype::kFloat32;
    if (type == nvinfer1::DataType::kHALF) return Dtype::kFloat16;
    return std::nullopt;
}

std::optional<Layout> layout_of(nvinfer1::TensorFormat format) noexcept {
    if (format == nvinfer1::TensorFormat::kLINEAR) return Layout::kNchw;
    if (format == nvinfer1::TensorFormat::kHWC8) return Layout::kNhwc;
    return std::nullopt;
}

}  // namespace acmix::tensorrt
