// find() and launch(), for the problems that src/operators.cpp instantiates them with.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <utility>

#include "acmix/launch.h"

namespace acmix {

inline std::string unsupported(const std::string& got, const std::string& supported) {
    return "unsupported: got " + got + ", supported " + supported;
}

// Why the definition or the kernels do not take the sizes that are known; empty if they do.
template <class Problem>
std::string outside(const Problem& problem) {
    using Operator = Definition<Problem>;
    for (const Size<Problem>& size : Operator::kSizes) {
        const Span<std::int32_t>& choices = size.choices;
        const std::int32_t value = problem.*size.at;
        if (value < 1 || choices.size == 0) continue;
        if (std::find(choices.begin(), choices.end(), value) != choices.end()) continue;
        std::string list;
        for (const std::int32_t one : choices) list += (list.empty() ? "" : ", ") + std::to_string(one);
        return unsupported(std::string(size.name) + " " + std::to_string(value), list);
    }
    for (const Span<Tensor<Problem>>& tensors : {Span(Operator::kInputs), Span(Operator::kOutputs)}) {
        for (const Tensor<Problem>& tensor : tensors) {
            for (const Axis<Problem>& axis : tensor.axes) {
                const auto [over, under] = quotient(axis, problem);
                if (axis.rounds_up || under < 1 || over % under == 0) continue;
                return unsupported(axis.text + (" = " + std::to_string(over)) + " / " + std::to_string(under),
                                   "whole numbers");
            }
        }
    }
    for (const Bound<Problem>& bound : Operator::kBounds) {
        if (bound.where != nullptr && problem.*bound.where != bound.is) continue;
        const std::int64_t value = length(bound.value, problem), limit = length(bound.limit, problem);
        if (value < 1 || (bound.upper ? value <= limit : value >= limit)) continue;
        return unsupported(std::string(bound.value.text) + " " + std::to_string(value),
                           (bound.upper ? "at most " : "at least ") + std::to_string(limit));
    }
    return "";
}

// What an entry has to be compiled for, 0 where the operator has nothing of the kind.
template <class Problem>
std::int32_t padded_size(const Problem& problem) {
    constexpr Member<Problem> kPadded = Definition<Problem>::kPadded;
    if constexpr (kPadded == nullptr)
        return 0;
    else
        return problem.*kPadded;
}

template <class Problem>
Found<Problem> find(const Problem& problem, std::int32_t sm, const Kernel* wanted) {
    if (std::string reason = outside(problem); !reason.empty()) return {nullptr, std::move(reason)};
    for (const Entry<Problem>& entry : table<Problem>()) {
        if (entry.dtype == problem.dtype && entry.layout == problem.layout && entry.head_dim >= padded_size(problem) &&
            (wanted == nullptr || entry.kernel == *wanted) && entry.min_sm <= sm) {
            return {&entry, ""};
        }
    }
    std::string rows;
    for (const Entry<Problem>& entry : table<Problem>()) {
        const std::string row = std::string(name(entry.dtype)) + " " + name(entry.layout) + " " + name(entry.kernel) +
                                (entry.min_sm > 0 ? " from sm_" + std::to_string(entry.min_sm) : "");
        if (rows.find(row) == std::string::npos) rows += (rows.empty() ? "" : ", ") + row;
    }
    return {nullptr, unsupported(std::string(name(problem.dtype)) + " " + name(problem.layout) +
                                     (wanted == nullptr ? "" : std::string(" ") + name(*wanted)) +
                                     (sm == kAnySm ? "" : " on sm_" + std::to_string(sm)),
                                 rows)};
}

// Why a problem that find() may accept cannot be launched; empty if it can.
template <class Problem>
std::string incomplete(const Problem& problem) {
    bool positive = problem.batch >= 0;
    for (const Size<Problem>& size : Definition<Problem>::kSizes) {
        positive &= problem.*size.at > 0 || size.at == &Problem::batch;
    }
    if (!positive)
        return unsupported("a size that is not positive", "a batch of at least 0 and other sizes of at least 1");
    std::string reason;
    for_each_attribute<Problem>([&](const auto& attribute) {
        const auto value = problem.*attribute.at;
        if constexpr (std::is_floating_point_v<decltype(value)>) {
            if (std::isfinite(value)) return;
            reason = unsupported(std::string(attribute.name) + " " + std::to_string(value), "finite numbers");
        }
    });
    return reason;
}

template <class Problem>
std::string launch(const Problem& problem, const void* const* inputs, void* y, cudaStream_t stream,
                   const Kernel* wanted) {
    if (std::string reason = incomplete(problem); !reason.empty()) return reason;
    if (problem.batch == 0) return "";
    int device = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) {
        Found<Problem> found = find(problem, major * 10 + minor, wanted);
        if (found.entry == nullptr) return std::move(found.reason);
        error = found.entry->launch(problem, inputs, y, stream);
    }
    return error == cudaSuccess ? "" : std::string("CUDA: ") + cudaGetErrorString(error);
}

// For the C interface: launch() as it says there.
template <class Problem>
const char* launch_on_device(const Problem* problem, int kernel, const void* const* inputs, void* y,
                             cudaStream_t stream) {
    static thread_local std::string reason;
    const auto wanted = static_cast<Kernel>(kernel);
    reason = launch(*problem, inputs, y, stream, kernel < 0 ? nullptr : &wanted);
    return reason.empty() ? nullptr : reason.c_str();
}

}  // namespace acmix
