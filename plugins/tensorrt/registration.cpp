// How TensorRT finds the plugins: registered where the library is loaded, or asked for through the entry points.
#include <NvInfer.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "creators.h"
#include "log.h"

#if NV_TENSORRT_MAJOR >= 10
#include "plugin_v3.h"
#define ACMIX_GET_CREATORS getCreators
#else
#include "plugin_v2.h"
#define ACMIX_GET_CREATORS getPluginCreators
#endif

namespace acmix::tensorrt {
namespace {

template <class... Problems>
constexpr std::size_t size(List<Problems...>) {
    return sizeof...(Problems);
}

using Creators = std::array<CreatorInterface*, size(Operators{})>;

template <class... Problems>
const Creators& creators(List<Problems...>) {
    static std::tuple<Creator<Problems>...> each;
    static const Creators all{&std::get<Creator<Problems>>(each)...};
    return all;
}

const Creators& creators() { return creators(Operators{}); }

template <class... Problems>
void describe(std::ostream& out, List<Problems...>) {
    const char* separator = "";
    ((out << separator << "{\"name\": \"" << Definition<Problems>::kOpType << "\", \"version\": \""
          << Definition<Problems>::kVersion << "\", \"namespace\": \"\", \"interface\": \"" << kInterface << "\"}",
      separator = ", "),
     ...);
}

// The TensorRT of this process, nothing of it where there is none for this library.
struct TensorRT {
    std::int32_t version = 0;
    nvinfer1::IPluginRegistry* registry = nullptr;
    decltype(&::getLogger) get_logger = nullptr;
};

template <class Function>
Function* symbol(void* library, const char* name) {
    return reinterpret_cast<Function*>(dlsym(library, name));
}

// 8 for 8601, 10 for 101300; TensorRT-RTX, which counts from 1, has the plugin interface of TensorRT 11.
std::int32_t major_of(std::int32_t version) {
    const std::int32_t major = version < 10000 ? version / 1000 : version / 10000;
    return major == 1 ? 11 : major;
}

// Nothing is linked, so that the library loads without TensorRT too. Python loads TensorRT with local symbols, so its
// files are asked by name as well, but never loaded from here.
TensorRT find_tensorrt() {
    std::int32_t other = 0;
    for (const char* name : {"", "libnvinfer.so.8", "libnvinfer.so.10", "libnvinfer.so.11", "libtensorrt_rtx.so.1"}) {
        void* const library = *name == '\0' ? RTLD_DEFAULT : dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr && *name != '\0') continue;
        const auto version = symbol<decltype(::getInferLibVersion)>(library, "getInferLibVersion");
        const auto registry = symbol<decltype(::getPluginRegistry)>(library, "getPluginRegistry");
        if (version == nullptr || registry == nullptr) continue;
        if (major_of(version()) == NV_TENSORRT_MAJOR) {
            return {version(), registry(), symbol<decltype(::getLogger)>(library, "getLogger")};
        }
        other = major_of(version());
    }
    if (other != 0) {
        std::fprintf(stderr, "acmix: not registered: built for TensorRT %d, but this process has TensorRT %d\n",
                     NV_TENSORRT_MAJOR, other);
    }
    return {};
}

const TensorRT loaded = find_tensorrt();

#if NV_TENSORRT_MAJOR >= 10 || NV_TENSORRT_MINOR >= 6
#define ACMIX_HAS_LOGGER_FINDER
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
#endif

// The finder's answer is for the calling thread and for now alone.
nvinfer1::ILogger* find_logger() {
#ifdef ACMIX_HAS_LOGGER_FINDER
    if (nvinfer1::ILoggerFinder* const finder = logger_finder) {
        if (nvinfer1::ILogger* const logger = finder->findLogger()) return logger;
    }
#endif
    return loaded.get_logger ? loaded.get_logger() : nullptr;
}

// The creators' static registration, which serves those who only dlopen the library.
class Registration {
 public:
    Registration() {
        const char* const wanted = std::getenv("ACMIX_REGISTER");
        if (loaded.registry == nullptr || (wanted != nullptr && std::string_view(wanted) == "0")) return;
        for (CreatorInterface* const creator : creators()) {
            if (loaded.registry->registerCreator(*creator, "")) registered_.push_back(creator);
        }
        if (registered_.size() < creators().size()) {
            log(Severity::kWARNING, "acmix",
                "not registered when loaded: this process has another copy of this library; load one of them alone");
        }
    }

    // loadLibrary registers the creators that it asks for, and fails where they are registered already. In the early
    // 8.6.0 deregisterCreator has another place in the registry's virtual table.
    void take_back() {
        if (loaded.version == 8600) return;
        const std::lock_guard lock(mutex_);
        for (CreatorInterface* const creator : registered_) loaded.registry->deregisterCreator(*creator);
        registered_.clear();
    }

 private:
    std::mutex mutex_;  // two runtimes may load plans at once
    std::vector<CreatorInterface*> registered_;
};

Registration registration;

}  // namespace

void log(Severity severity, const char* subject, const char* sentence) noexcept {
    try {
        if (nvinfer1::ILogger* const logger = find_logger()) {
            logger->log(severity, (std::string(subject) + ": " + sentence).c_str());
            return;
        }
    } catch (...) {
    }
    std::fprintf(stderr, "%s: %s\n", subject, sentence);
}

}  // namespace acmix::tensorrt

extern "C" {

// What loadLibrary asks for.
ACMIX_EXPORT acmix::tensorrt::CreatorInterface* const* ACMIX_GET_CREATORS(std::int32_t& count) {
    acmix::tensorrt::registration.take_back();
    count = static_cast<std::int32_t>(acmix::tensorrt::creators().size());
    return acmix::tensorrt::creators().data();
}

#ifdef ACMIX_HAS_LOGGER_FINDER
ACMIX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { acmix::tensorrt::logger_finder = finder; }
#endif

const char* acmix_creators() {
    static const std::string json = [] {
        using namespace acmix::tensorrt;
        std::ostringstream out;
        out << "{\"tensorrt\": \"" << NV_TENSORRT_MAJOR << '.' << NV_TENSORRT_MINOR << '.' << NV_TENSORRT_PATCH
            << "\", \"creators\": [";
        describe(out, acmix::Operators{});
        out << "]}";
        return out.str();
    }();
    return json.c_str();
}
}
