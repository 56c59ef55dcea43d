// The emulator's own tests: each line of output is one of them, the exit status the number of those that failed.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "acmix/ptx.cuh"

extern "C" void emulator_configure(std::int32_t sm, std::uint32_t seed);

namespace {

using namespace acmix::ptx;

int failures = 0;

void check(const char* name, bool right) {
    std::printf("%s %s\n", right ? "ok   " : "WRONG", name);
    failures += !right;
}

// In how many of 20 orders of threads `run` returns true.
template <class Run>
int count(Run run, int sm = 90) {
    int successes = 0;
    for (int seed = 0; seed < 20; ++seed) {
        emulator_configure(sm, seed);
        successes += run();
    }
    emulator_configure(90, 0);
    return successes;
}

// What the launch reports about `kernel(arguments...)` in one block of `threads` threads.
template <class... Parameters>
std::string report(void (*kernel)(Parameters...), int threads, std::size_t shared_bytes, Parameters... arguments) {
    return cudaGetErrorString(launch(kernel, dim3(1), dim3(threads), shared_bytes, nullptr, arguments...));
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

enum class Missing { kNothing, kBarrier, kSecondBarrier, kCommit, kWait };

// sum[0] of 128 threads' numbers: a tree, its last levels by shuffle.
__global__ void block_sum(float* sum, Missing missing) {
    auto* values = reinterpret_cast<float*>(dynamic_shared());
    values[threadIdx.x] = threadIdx.x;
    for (unsigned half = 64; half >= 32; half /= 2) {
        if (missing != Missing::kBarrier) __syncthreads();
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    }
    if (threadIdx.x >= 32) return;
    float value = values[threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    if (threadIdx.x == 0) *sum = value;
}

// reversed[i] = values[63 - i] for three tiles of 64 through one buffer.
__global__ void reverse_tiles(const float4* values, float* reversed, Missing missing) {
    auto* tile = reinterpret_cast<float*>(dynamic_shared());
    for (int i = 0; i < 3; ++i) {
        if (threadIdx.x < 16) copy_async<16>(tile + 4 * threadIdx.x, values + 16 * i + threadIdx.x, true);
        if (missing != Missing::kCommit) commit_copies();
        if (missing != Missing::kWait) wait_for_copies<0>();
        if (missing != Missing::kBarrier) __syncthreads();
        reversed[64 * i + threadIdx.x] = tile[63 - threadIdx.x];
        if (missing != Missing::kSecondBarrier) __syncthreads();
    }
}

bool reverses(Missing missing) {
    alignas(16) float values[192], reversed[192];
    for (int i = 0; i < 192; ++i) values[i] = i + 1;
    report(reverse_tiles, 64, 256, reinterpret_cast<const float4*>(values), reversed, missing);
    for (int i = 0; i < 192; ++i)
        if (reversed[i] != values[i / 64 * 64 + 63 - i % 64]) return false;
    return true;
}

// A word copied; zeros beside it, where nothing lies to copy from.
__global__ void copy_or_clear(const uint4* from, uint4* to) {
    auto* words = reinterpret_cast<uint4*>(dynamic_shared());
    copy_async<16>(words + threadIdx.x, threadIdx.x == 0 ? from : nullptr, threadIdx.x == 0);
    commit_copies();
    wait_for_copies<0>();
    to[threadIdx.x] = words[threadIdx.x];
}

bool copies_or_clears() {
    const uint4 from = {1, 2, 3, 4};
    uint4 to[2];
    report(copy_or_clear, 2, 32, &from, static_cast<uint4*>(to));
    return std::memcmp(&to[0], &from, sizeof from) == 0 && to[1].x + to[1].y + to[1].z + to[1].w == 0;
}

// d = a b: a [16, kDepth] and b [kDepth, 8] row by row, loaded as matrices of 8x8; d [16, 8].
template <int kDepth>
__global__ void multiply(const __half* a, const __half* b, float* d) {
    auto* left = reinterpret_cast<__half*>(dynamic_shared());
    auto* right = left + 16 * kDepth;
    const unsigned lane = threadIdx.x;
    for (unsigned i = lane; i < 16 * kDepth; i += 32) left[i] = a[i];
    for (unsigned i = lane; i < 8 * kDepth; i += 32) right[i] = b[i];
    __syncwarp();
    float sums[4] = {};
    if constexpr (kDepth == 16) {
        std::uint32_t rows[4], columns[2];
        load_matrices<false>(rows, left + lane % 16 * 16 + lane / 16 * 8);
        load_matrices<true>(columns, right + lane % 16 * 8);
        mma_k16(sums, rows, columns, sums);
    } else {
        std::uint32_t rows[2], columns[2];
        load_matrices<false>(rows, left + lane % 16 * 8);
        load_matrices<true>(columns, right + lane % 8 * 8);
        mma_k8(sums, rows, columns[0], sums);
    }
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <int kDepth>
bool multiplies() {
    __half a[16 * kDepth], b[kDepth * 8];
    for (int i = 0; i < 16 * kDepth; ++i) a[i] = __float2half(i * 37 % 29 - 14);
    for (int i = 0; i < 8 * kDepth; ++i) b[i] = __float2half(i * 53 % 31 - 15);
    float d[16 * 8];
    report(multiply<kDepth>, 32, 2 * 24 * kDepth, static_cast<const __half*>(a), static_cast<const __half*>(b), d);
    for (int i = 0; i < 16 * 8; ++i) {
        float sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += __half2float(a[i / 8 * kDepth + k]) * __half2float(b[k * 8 + i % 8]);
        if (d[i] != sum) return false;
    }
    return true;
}

enum class Fault { kDivergentBarrier, kMissingLane, kTwoInstructions, kOutside, kCopyOutside, kMisaligned, kRow };

__global__ void faulty(Fault fault, std::uint32_t* out) {
    auto* bytes = dynamic_shared();
    std::uint32_t r[4];
    float d[4];
    switch (fault) {
        case Fault::kDivergentBarrier:
            if (threadIdx.x < 32) __syncthreads();
            break;
        case Fault::kMissingLane:
            if (threadIdx.x != 5) __syncwarp();
            break;
        case Fault::kTwoInstructions:
            threadIdx.x % 2 ? mma_k8(d, {0, 0}, 0, d) : __syncwarp();
            break;
        case Fault::kOutside:
            bytes[1024] = 0;
            break;
        case Fault::kCopyOutside:
            copy_async<16>(bytes + 1024, bytes, true);
            break;
        case Fault::kMisaligned:
            *reinterpret_cast<uint2*>(out + 1) = *reinterpret_cast<const uint2*>(out);
            break;
        case Fault::kRow:
            load_matrices<false>(r, bytes + 8);
            break;
    }
}

std::string fault(Fault fault) {
    alignas(16) std::uint32_t out[4] = {};
    return report(faulty, 64, 1024, fault, out);
}

__global__ void touch_all(unsigned* seen) {
    ++seen[((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 12 + threadIdx.z * 6 + threadIdx.y * 3 +
           threadIdx.x];
}

}  // namespace

int main() {
    float sum = 0;
    const auto sums = [&](Missing missing) {
        report(block_sum, 128, 512, &sum, missing);
        return sum == 127 * 128 / 2;
    };
    check("a reduction is right in every order", count([&] { return sums(Missing::kNothing); }) == 20);
    check("without its barrier it is not", count([&] { return sums(Missing::kBarrier); }) == 0);

    check("copied tiles are right in every order", count([] { return reverses(Missing::kNothing); }) == 20);
    check("without the first barrier they are not", count([] { return reverses(Missing::kBarrier); }) == 0);
    check("without the second barrier they are not", count([] { return reverses(Missing::kSecondBarrier); }) == 0);
    check("without the commit they are not", count([] { return reverses(Missing::kCommit); }) == 0);
    check("without the wait they are not", count([] { return reverses(Missing::kWait); }) == 0);
    check("before sm_80 there is nothing to wait for", count([] { return reverses(Missing::kWait); }, 75) == 20);

    check("a copy of nothing clears", count(copies_or_clears) == 20);

    check("mma.m16n8k16 with ldmatrix multiplies", count(multiplies<16>) == 20);
    check("so do two of half the depth before sm_80", count(multiplies<16>, 75) == 20);
    check("mma.m16n8k8 with ldmatrix multiplies", count(multiplies<8>) == 20);
    check("there is no mma before sm_75", count(multiplies<8>, 72) == 0);

    check("a divergent barrier is named", contains(fault(Fault::kDivergentBarrier), "32 threads at __syncthreads"));
    check("a missing lane is named", contains(fault(Fault::kMissingLane), "31 threads at __syncwarp"));
    check("two instructions at once are named", contains(fault(Fault::kTwoInstructions), "32 threads at mma.m16n8k8"));
    check("a write outside of shared memory is named", contains(fault(Fault::kOutside), "write of 1 bytes out of"));
    check("a copy to outside is named", contains(fault(Fault::kCopyOutside), "cp.async: offset 1024"));
    check("an unaligned access is named", contains(fault(Fault::kMisaligned), "self_test.cpp:"));
    check("a misaligned row is named", contains(fault(Fault::kRow), "ldmatrix: offset 8 is not aligned"));
    check("a launch after a fault works", sums(Missing::kNothing));

    check("48 KiB of shared memory work", contains(report(faulty, 32, 49152, Fault::kRow, {}), "offset 8 is not"));
    check("more is refused", contains(report(faulty, 32, 49153, Fault::kRow, {}), "more than 48 KiB"));

    std::vector<unsigned> seen(2 * 3 * 4 * 12);
    launch(touch_all, dim3(2, 3, 4), dim3(3, 2, 2), 0, nullptr, seen.data());
    check("every thread of a grid runs once", seen == std::vector<unsigned>(seen.size(), 1));
    return failures;
}
