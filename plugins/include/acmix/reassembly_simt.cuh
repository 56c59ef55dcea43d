// Reassembly: the weighted sum of the K x K neighbours of every output pixel, with weights that are given.
#pragma once

#include "acmix/ptx.cuh"
#include "acmix/tensors.cuh"

namespace acmix {

// What the host works out once for all blocks.
template <Dtype kDtype, Layout kLayout>
struct ReassemblyPlan {
    Strides<Element<kDtype>, kLayout> x, w, y;
    Divisor by_width, by_upsampling;
    std::int32_t width, pixels;  // of the output
    std::int32_t parts;          // runs of up to kVector channels in a group
};

// Neighbouring threads take neighbouring addresses: pixels in NCHW, in NHWC first a few runs of channels.
template <Layout kLayout>
struct ReassemblyBlock {
    static constexpr int kThreads = 128;
    static constexpr int kParts = kLayout == Layout::kNhwc ? 4 : 1;
    static constexpr int kPixels = kThreads / kParts;
};

// One thread per output pixel and up to kVector channels of one group.
//
// `make instructions` counts by the headings Prologue, Rows and Epilogue.
template <Dtype kDtype, Layout kLayout, int kKernelSize>
__global__ void reassembly_simt_kernel(Reassembly problem, ReassemblyPlan<kDtype, kLayout> plan,
                                       const Element<kDtype>* __restrict__ x, const Element<kDtype>* __restrict__ w,
                                       Element<kDtype>* __restrict__ y) {
    using T = Element<kDtype>;
    using Block = ReassemblyBlock<kLayout>;
    constexpr int kMargin = kKernelSize / 2;

    // Prologue: the pixel and the channels.
    const int thread = static_cast<int>(threadIdx.x);
    const int pixel = static_cast<int>(blockIdx.x) * Block::kPixels + thread / Block::kParts;
    const int part = static_cast<int>(blockIdx.y) * Block::kParts + thread % Block::kParts;
    const int group = part / plan.parts, first = (part - group * plan.parts) * kVector;
    if (pixel >= plan.pixels || group >= problem.groups) return;
    const int channels = min(problem.group_channels - first, kVector);
    const int channel = group * problem.group_channels + first;
    // NHWC reads whole words where every run of channels is one.
    const bool whole = kLayout == Layout::kNhwc ? problem.group_channels % kVector == 0 : channels == kVector;
    const int out_y = plan.by_width.quotient(pixel), out_x = pixel - out_y * plan.width;
    const int center_y = plan.by_upsampling.quotient(out_y * problem.stride);
    const int center_x = plan.by_upsampling.quotient(out_x * problem.stride);
    const T* const image = plan.x.at(x + blockIdx.z * plan.x.image, channel, 0);
    const T* const weights =
        plan.w.below(plan.w.at(w + blockIdx.z * plan.w.image, group * kKernelSize * kKernelSize, out_x), out_y);

    // Rows: of the window.
    float sum[kVector] = {};
#pragma unroll 1
    for (int row = 0; row < kKernelSize; ++row) {
        const int pixel_y = center_y + (row - kMargin) * problem.dilation;
        if (pixel_y < 0 || pixel_y >= problem.height) continue;
        const T* const line = plan.x.below(image, pixel_y);
#pragma unroll
        for (int column = 0; column < kKernelSize; ++column) {
            const int pixel_x = center_x + (column - kMargin) * problem.dilation;
            if (pixel_x < 0 || pixel_x >= problem.width) continue;
            const float weight = to_float(*plan.w.at(weights, row * kKernelSize + column, 0));
            const T* const from = plan.x.at(line, 0, pixel_x);
            float values[kVector] = {};
            if (whole) {
                load(values, from, plan.x);
            } else {
                for (int i = 0; i < channels; ++i) values[i] = to_float(*plan.x.at(from, i, 0));
            }
#pragma unroll
            for (int i = 0; i < kVector; ++i) sum[i] += weight * values[i];
        }
    }

    // Epilogue
    T* const to = plan.y.below(plan.y.at(y + blockIdx.z * plan.y.image, channel, out_x), out_y);
    if (whole) {
        save(to, sum, plan.y);
    } else {
        for (int i = 0; i < channels; ++i) store(plan.y.at(to, i, 0), sum[i]);
    }
}

// Launches the kernel on `stream`. cudaErrorMisalignedAddress where NHWC tensors are not aligned to 16 bytes.
template <Dtype kDtype, Layout kLayout, int>
cudaError_t reassembly_simt(const Reassembly& problem, const void* const* inputs, void* y, cudaStream_t stream) {
    using T = Element<kDtype>;
    using Block = ReassemblyBlock<kLayout>;
    const void *const x = inputs[0], *const w = inputs[1];
    if (kLayout == Layout::kNhwc && !(aligned(x, 16) && aligned(y, 16))) return cudaErrorMisalignedAddress;
    const auto padded = [](int channels) { return kLayout == Layout::kNhwc ? ceil_div(channels, 8) * 8 : channels; };
    const int height = problem.height * problem.upsampling / problem.stride;
    const int width = problem.width * problem.upsampling / problem.stride;
    const int channels = padded(problem.groups * problem.group_channels);
    const int parts = ceil_div(problem.group_channels, kVector);
    const dim3 grid(ceil_div(height * width, Block::kPixels), ceil_div(problem.groups * parts, Block::kParts),
                    problem.batch);
    return with_constant<3, 5, 7, 9>(problem.kernel_size, [&](auto kernel_size) {
        const ReassemblyPlan<kDtype, kLayout> plan{{channels, problem.height, problem.width},
                                                   {padded(problem.groups * kernel_size * kernel_size), height, width},
                                                   {channels, height, width},
                                                   Divisor(width),
                                                   Divisor(problem.upsampling),
                                                   width,
                                                   height * width,
                                                   parts};
        return ptx::launch(reassembly_simt_kernel<kDtype, kLayout, kernel_size>, grid, dim3(Block::kThreads), 0, stream,
                           problem, plan, static_cast<const T*>(x), static_cast<const T*>(w), static_cast<T*>(y));
    });
}

}  // namespace acmix
