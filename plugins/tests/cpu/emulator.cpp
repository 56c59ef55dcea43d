#include "emulator.h"

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr std::size_t kFenceBytes = 4 << 10;
constexpr std::size_t kMaxSharedBytes = 48 << 10;  // what every device gives without being asked for more
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarpSize = 32;
constexpr unsigned char kPoison = 0xff;  // NaN as float and as half
constexpr const char* kFinished = "the end";

struct Copy {
    void* shared;
    const void* global;
    std::size_t bytes;
    std::size_t group;
};

struct Fence {
    std::uintptr_t begin, end;
};

struct Thread {
    uint3 index;
    ucontext_t start;  // entered once per launch, `context` from then on: no system call
    jmp_buf context;
    bool started;
    const char* place;  // what it stands at
    std::uint32_t mask;
    void* operand;
    std::vector<Copy> copies;
    std::size_t group;  // of the copies that it begins now
};

int sm = 90;
std::minstd_rand random_number;
std::vector<Fence> fences;  // memory that no kernel may touch
bool only_middle = false;   // of the blocks of a launch one runs
cudaError_t last_error = cudaSuccess;
std::string message;

// The block in flight.
std::vector<Thread> threads;
std::vector<Thread*> ready;
std::vector<unsigned char> shared;
std::size_t shared_size;
unsigned waiting;                                     // at the barrier
std::map<std::string, unsigned> executed[kWarpSize];  // by the lanes of the first warp
Thread* current = nullptr;
const std::function<void()>* body;
jmp_buf host;

[[noreturn]] void resume_next() {
    if (ready.empty()) _longjmp(host, 1);
    std::swap(ready[random_number() % ready.size()], ready.back());
    current = ready.back();
    ready.pop_back();
    threadIdx = current->index;
    if (current->started) _longjmp(current->context, 1);
    current->started = true;
    setcontext(&current->start);
    std::abort();
}

__attribute__((noinline)) void let_others_run() {
    if (_setjmp(current->context) == 0) resume_next();
}

__attribute__((noinline)) void run_until_idle() {
    if (_setjmp(host) == 0) resume_next();
    current = nullptr;
}

void fiber() {
    for (;;) {
        (*body)();
        current->place = kFinished;
        let_others_run();  // until the next block
    }
}

void copy(const Copy& copy) { std::memcpy(copy.shared, copy.global, copy.bytes); }

Fence fence(const void* begin, std::size_t bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    return {address, address + bytes};
}

void check_access(const void* pointer, std::size_t bytes, const char* what) {
    const Fence access = fence(pointer, bytes);
    const auto touches = [&](const Fence& fence) { return access.begin < fence.end && fence.begin < access.end; };
    if (std::any_of(fences.begin(), fences.end(), touches)) fail("%s %zu bytes out of bounds", what, bytes);
}

cudaError_t refuse(cudaError_t error, const std::string& reason) {
    message = reason;
    return last_error = error;
}

// Threads of the block in flight that do not stand at the end, counted by place.
std::string stuck() {
    std::map<std::string, int> places;
    for (const Thread& thread : threads) ++places[thread.place];
    if (places[kFinished] == static_cast<int>(threads.size())) return "";
    std::string text = "deadlock:";
    for (const auto& [place, count] : places) text += " " + std::to_string(count) + " threads at " + place + ",";
    return text;
}

void run_block() {
    std::fill(shared.begin(), shared.end(), kPoison);
    waiting = 0;
    ready.clear();
    for (auto& lane : executed) lane.clear();
    for (Thread& thread : threads) {
        thread.place = "the start";
        thread.copies.clear();
        thread.group = 0;
        ready.push_back(&thread);
    }
    run_until_idle();
    if (!message.empty()) return;
    message = stuck();
}

}  // namespace

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (current == nullptr) {
        std::fprintf(stderr, "%s\n", text);
        std::abort();
    }
    message = text;
    _longjmp(host, 1);
}

cudaError_t launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread) {
    static const std::unique_ptr<char[]> stacks(new char[kMaxThreads * kStackBytes]);
    const unsigned count = block.x * block.y * block.z;
    if (count < 1 || count > kMaxThreads) return refuse(cudaErrorInvalidConfiguration, "threads in a block");
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
        return refuse(cudaErrorInvalidConfiguration, "blocks in a grid");
    if (shared_bytes > kMaxSharedBytes) return refuse(cudaErrorInvalidValue, "more than 48 KiB of shared memory");

    gridDim = grid;
    blockDim = block;
    body = &thread;
    shared_size = shared_bytes;
    shared.resize(2 * kFenceBytes + shared_bytes);
    threads.resize(count);
    for (unsigned i = 0; i < count; ++i) {
        Thread& t = threads[i];
        t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        t.started = false;
        getcontext(&t.start);
        t.start.uc_stack.ss_sp = &stacks[i * kStackBytes];
        t.start.uc_stack.ss_size = kStackBytes;
        makecontext(&t.start, fiber, 0);
    }
    message.clear();
    const std::size_t tensor_fences = fences.size();
    fences.push_back(fence(shared.data(), kFenceBytes));
    fences.push_back(fence(shared.data() + kFenceBytes + shared_bytes, kFenceBytes));
    const unsigned middle = (grid.z / 2 * grid.y + grid.y / 2) * grid.x + grid.x / 2;
    for (unsigned i = 0; i < grid.x * grid.y * grid.z && message.empty(); ++i) {
        if (only_middle && i != middle) continue;
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        run_block();
    }
    fences.resize(tensor_fences);
    return last_error = message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void count(const char* instruction) {
    const std::size_t thread = current - threads.data();
    if (thread < kWarpSize) ++executed[thread][instruction];
}

int device_sm() { return sm; }

void require_sm(int least, const char* instruction) {
    if (sm < least) fail("%s on sm_%d", instruction, sm);
}

unsigned char* shared_memory() { return shared.data() + kFenceBytes; }

void require_shared(const void* pointer, std::size_t bytes, const char* instruction) {
    const auto offset = static_cast<const unsigned char*>(pointer) - shared_memory();
    if (offset < 0 || offset + bytes > shared_size)
        fail("%s: offset %td of %zu bytes of shared memory", instruction, offset, shared_size);
    if (offset % bytes) fail("%s: offset %td is not aligned to %zu bytes", instruction, offset, bytes);
}

void barrier() {
    current->place = "__syncthreads";
    if (++waiting == threads.size()) {
        waiting = 0;
        for (Thread& thread : threads) ready.push_back(&thread);
    }
    let_others_run();
}

void collective(std::uint32_t mask, const char* instruction, void* operand, const std::function<void(Lanes)>& perform) {
    const std::size_t rank = current - threads.data();
    const std::size_t warp = rank / kWarpSize * kWarpSize;
    if (!(mask >> rank % kWarpSize & 1)) fail("%s: the mask leaves out the lane itself", instruction);
    count(instruction);
    current->place = instruction;
    current->mask = mask;
    current->operand = operand;
    void* operands[kWarpSize] = {};
    bool complete = true;
    for (std::size_t lane = 0; lane < kWarpSize && complete; ++lane) {
        if (!(mask >> lane & 1)) continue;
        complete = warp + lane < threads.size() && threads[warp + lane].mask == mask &&
                   std::strcmp(threads[warp + lane].place, instruction) == 0;
        if (complete) operands[lane] = threads[warp + lane].operand;
    }
    if (complete) {
        perform(operands);
        for (std::size_t lane = 0; lane < kWarpSize; ++lane) {
            if (!(mask >> lane & 1)) continue;
            threads[warp + lane].place = "work";
            ready.push_back(&threads[warp + lane]);
        }
    }
    let_others_run();
}

void begin_copy(void* to, const void* from, std::size_t bytes) {
    count("cp.async");
    require_shared(to, bytes, "cp.async");
    check_access(from, bytes, "cp.async of");
    if (reinterpret_cast<std::uintptr_t>(from) % bytes) fail("cp.async: %p is not aligned to %zu bytes", from, bytes);
    const Copy begun{to, from, bytes, current->group};
    if (sm < 80 || random_number() & 1) return copy(begun);
    current->copies.push_back(begun);
}

void commit_copies() { ++current->group; }

void wait_for_copies(std::size_t pending) {
    auto& copies = current->copies;
    const auto landed = std::stable_partition(
        copies.begin(), copies.end(), [&](const Copy& begun) { return begun.group + pending < current->group; });
    std::for_each(copies.begin(), landed, copy);
    copies.erase(copies.begin(), landed);
}

}  // namespace emulator

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = emulator::sm / 10;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = emulator::sm % 10;
            break;
    }
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorMisalignedAddress) return "misaligned address";
    return error == cudaSuccess ? "no error" : emulator::message.c_str();
}

extern "C" {

// Choose the device's compute capability (75 for sm_75) and the order of threads.
void emulator_configure(std::int32_t sm, std::uint32_t seed) {
    emulator::sm = sm;
    emulator::fences.clear();
    emulator::only_middle = false;
    emulator::random_number.seed(seed);
}

// Forbid kernels to touch this memory, until the next emulator_configure.
void emulator_fence(const void* begin, std::size_t bytes) { emulator::fences.push_back(emulator::fence(begin, bytes)); }

// Run the block in the middle of the grid alone, until the next emulator_configure.
void emulator_run_middle() { emulator::only_middle = true; }

// Blocks, threads of a block, and bytes of shared memory that the last launch asked for.
std::uint32_t emulator_blocks() { return gridDim.x * gridDim.y * gridDim.z; }
std::uint32_t emulator_threads() { return blockDim.x * blockDim.y * blockDim.z; }
std::size_t emulator_shared_bytes() { return emulator::shared_size; }

// How often the first warp of the last block executed an instruction of this name.
std::uint32_t emulator_executed(const char* instruction) {
    std::uint32_t most = 0;
    for (const auto& lane : emulator::executed) {
        const auto found = lane.find(instruction);
        if (found != lane.end()) most = std::max(most, found->second);
    }
    return most;
}

// Called by kernels compiled with -fsanitize=kernel-address,alignment,bounds, which report every access.
#define ACCESS(bytes)                                                                                 \
    void __asan_load##bytes##_noabort(const void* p) { emulator::check_access(p, bytes, "read of"); } \
    void __asan_store##bytes##_noabort(const void* p) { emulator::check_access(p, bytes, "write of"); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16) void __asan_loadN_noabort(const void* p, std::size_t bytes) {
    emulator::check_access(p, bytes, "read of");
}
void __asan_storeN_noabort(const void* p, std::size_t bytes) { emulator::check_access(p, bytes, "write of"); }
void __asan_handle_no_return() {}

struct Place {
    const char* file;
    std::uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const Place* place, const void* pointer) {
    emulator::fail("%s:%u: unaligned access to %p", place->file, place->line, pointer);
}
void __ubsan_handle_out_of_bounds(const Place* place, std::uintptr_t index) {
    emulator::fail("%s:%u: index %zu out of bounds", place->file, place->line, index);
}
}
