// Errors inside the wrappers are exceptions of one sentence; at TensorRT's boundary they become a logged one.
#pragma once

#include <NvInfer.h>

#include <exception>
#include <sstream>
#include <stdexcept>

namespace acmix::tensorrt {

using Severity = nvinfer1::ILogger::Severity;

// Writes "<subject>: <sentence>" to the logger of the engine that called this thread's plugin method, else to
// TensorRT's own, or to stderr where there is none.
void log(Severity severity, const char* subject, const char* sentence) noexcept;

// Throws std::runtime_error with the parts as one sentence.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream sentence;
    (sentence << ... << parts);
    throw std::runtime_error(sentence.str());
}

// What `body` returns, or `failure` with a logged sentence where it throws.
template <class Result, class Body>
Result guarded(const char* op_type, Result failure, Body&& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        log(Severity::kERROR, op_type, error.what());
    } catch (...) {
        log(Severity::kERROR, op_type, "unknown exception");
    }
    return failure;
}

}  // namespace acmix::tensorrt
