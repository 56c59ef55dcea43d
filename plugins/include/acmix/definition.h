// The vocabulary of acmix/operators.h, which is that of acmix_deploy/operators/spec.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>

#define ACMIX_EXPORT __attribute__((visibility("default")))

namespace acmix {

enum class Dtype : std::int32_t { kFloat32 = 0, kFloat16 = 1 };
// TensorRT's LINEAR and HWC8: in NHWC a pixel's channels are padded to a multiple of 8.
enum class Layout : std::int32_t { kNchw = 0, kNhwc = 1 };
enum class Kernel : std::int32_t { kSimt = 0, kMma = 1 };  // scalar arithmetic, tensor cores

// Names, tensors and limits of the operator that a problem is of. A problem is an aggregate: `dtype`, `layout`, its
// sizes from `batch` on, of which 0 is one that is not known yet, and the attributes that are no sizes.
template <class Problem>
struct Definition;

template <class... Problems>
struct List {};

template <class Problem, class T = std::int32_t>
using Member = T Problem::*;

template <class T>
struct Span {
    const T* first = nullptr;
    std::size_t size = 0;

    constexpr Span() = default;
    template <std::size_t kCount>
    constexpr Span(const T (&values)[kCount]) : first(values), size(kCount) {}
    constexpr const T* begin() const { return first; }
    constexpr const T* end() const { return first + size; }
};

template <class Problem>
struct Size {
    const char* name;
    Member<Problem> at;
    Span<std::int32_t> choices = {};  // what kernels take; none for all
};

template <class Problem, class T>
struct Attribute {
    const char* name;
    Member<Problem, T> at;
    T fallback;
    T minimum;
};

template <class Problem>
struct Factor {
    Member<Problem> size = nullptr;
    int power = 1;  // negative: divides
};

// A length: coefficient * factors / divisor - less. Division leaves no rest, or is rounded up.
template <class Problem>
struct Axis {
    const char* text;
    std::int64_t coefficient;
    Factor<Problem> factors[5];  // up to the first without a size
    std::int32_t divisor = 1;
    bool rounds_up = false;
    std::int32_t less = 0;

    constexpr const Factor<Problem>* begin() const { return factors; }
    constexpr const Factor<Problem>* end() const {
        const Factor<Problem>* last = factors;
        while (last->size != nullptr) ++last;
        return last;
    }
};

template <class Problem>
struct Tensor {
    const char* name;
    Span<Axis<Problem>> axes;
};

template <class Problem>
struct Bound {
    Axis<Problem> value, limit;
    bool upper;
    Member<Problem> where = nullptr;  // given, it holds only where this is `is`
    std::int32_t is = 0;
};

struct Quotient {
    std::int64_t over, under;
};

// Numerator and denominator of a length; either is 0 where a size in it is.
template <class Problem>
constexpr Quotient quotient(const Axis<Problem>& axis, const Problem& problem) {
    Quotient parts{axis.coefficient, axis.divisor};
    for (const Factor<Problem>& factor : axis) {
        for (int i = 0; i < factor.power; ++i) parts.over *= problem.*factor.size;
        for (int i = 0; i > factor.power; --i) parts.under *= problem.*factor.size;
    }
    return parts;
}

// 0 where a size in it is.
template <class Problem>
constexpr std::int64_t length(const Axis<Problem>& axis, const Problem& problem) {
    const Quotient parts = quotient(axis, problem);
    if (parts.over == 0 || parts.under == 0) return 0;
    return (parts.over + (axis.rounds_up ? parts.under - 1 : 0)) / parts.under - axis.less;
}

// visit(attribute) for each attribute, in the order in which they are written.
template <class Problem, class Visit>
constexpr void for_each_attribute(Visit visit) {
    std::apply([&](const auto&... attributes) { (visit(attributes), ...); }, Definition<Problem>::kAttributes);
}

}  // namespace acmix
