// How TensorRT finds the plugins: registered where the library is loaded, or asked for through the entry points.
#include <NvInfer.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>
#include <tuple>

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

// The creators' static registration, which serves those who only dlopen the library.
class Registration {
 public:
    Registration() : tensorrt_(find_tensorrt()), registered_(tensorrt_.registry != nullptr) {
        if (!registered_) return;
        for (CreatorInterface* const creator : creators()) {
            registered_ &= tensorrt_.registry->registerCreator(*creator, "");
        }
    }

    // loadLibrary registers the creators that it asks for, and fails where they are registered already. In the early
    // 8.6.0 deregisterCreator has another place in the registry's virtual table.
    void take_back() {
        if (!registered_ || tensorrt_.version == 8600) return;
        for (CreatorInterface* const creator : creators()) tensorrt_.registry->deregisterCreator(*creator);
        registered_ = false;
    }

    nvinfer1::ILogger* logger() const { return tensorrt_.get_logger ? tensorrt_.get_logger() : nullptr; }

 private:
    TensorRT tensorrt_;
    bool registered_;
};

Registration registration;

std::atomic<nvinfer1::ILogger*> given_logger{nullptr};

}  // namespace

void log_error(const char* op_type, const char* sentence) noexcept {
    try {
        nvinfer1::ILogger* logger = given_logger;
        if (logger == nullptr) logger = registration.logger();
        if (logger != nullptr) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, (std::string(op_type) + ": " + sentence).c_str());
            return;
        }
    } catch (...) {
    }
    std::fprintf(stderr, "%s: %s\n", op_type, sentence);
}

}  // namespace acmix::tensorrt

extern "C" {

// What loadLibrary asks for.
ACMIX_EXPORT acmix::tensorrt::CreatorInterface* const* ACMIX_GET_CREATORS(std::int32_t& count) {
    acmix::tensorrt::registration.take_back();
    count = static_cast<std::int32_t>(acmix::tensorrt::creators().size());
    return acmix::tensorrt::creators().data();
}

#if NV_TENSORRT_MAJOR >= 10 || NV_TENSORRT_MINOR >= 6
// Where errors go from now on.
ACMIX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    acmix::tensorrt::guarded("acmix", 0, [&] {
        if (finder != nullptr) acmix::tensorrt::given_logger = finder->findLogger();
        return 0;
    });
}
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
