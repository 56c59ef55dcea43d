// Asks a plugin library, in a process without TensorRT: which tensor formats does a node accept, does what an engine
// file keeps of it come back the same, what does it compute, and where does it say what is wrong?
//
//   formats LIBRARY OP_TYPE ATTRIBUTES SHAPE ...          one line for each accepted combination
//   plan LIBRARY OP_TYPE ATTRIBUTES                       one line for each question
//   log LIBRARY OP_TYPE                                   one line for each error
//   namespace LIBRARY OP_TYPE ATTRIBUTES                  a creator's and a node's after null
//   timing_cache_id LIBRARY OP_TYPE ATTRIBUTES
//   enqueue LIBRARY OP_TYPE ATTRIBUTES TYPE FORMAT SHAPE ... FILE ...
//                                                         one line for each step and its result
//
// ATTRIBUTES are num_heads=4,scale=0.3 with a point in what is no integer. A SHAPE is 1,192,8,8 with -1 for what is
// dynamic; one for each tensor, the output last. Each FILE holds a tensor as it lies in memory; the last, which the
// output overwrites, also what is there before.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

#if NV_TENSORRT_MAJOR >= 10
using CreatorBase = IPluginCreatorInterface;
using Creator = IPluginCreatorV3One;
constexpr const char* kEntryPoint = "getCreators";
#else
using CreatorBase = IPluginCreator;
using Creator = IPluginCreator;
constexpr const char* kEntryPoint = "getPluginCreators";
#endif

void* load(const char* library) {
    void* const handle = dlopen(library, RTLD_NOW);
    if (handle == nullptr) std::printf("%s\n", dlerror()), std::exit(1);
    return handle;
}

Creator& find_creator(const char* library, const char* op_type) {
    void* const handle = load(library);
    const auto creators = reinterpret_cast<CreatorBase* const* (*)(int32_t&)>(dlsym(handle, kEntryPoint));
    int32_t count = 0;
    for (CreatorBase* const* one = creators(count); count > 0; ++one, --count) {
        if (Creator& creator = static_cast<Creator&>(**one); std::strcmp(creator.getPluginName(), op_type) == 0) {
            return creator;
        }
    }
    std::printf("no %s in %s\n", op_type, library), std::exit(1);
}

PluginTensorDesc tensor(const std::string& shape) {
    PluginTensorDesc description{};
    std::istringstream sizes(shape);
    for (std::string size; std::getline(sizes, size, ',');) {
        description.dims.d[description.dims.nbDims++] = std::stoi(size);
    }
    return description;
}

struct Attributes {
    std::vector<std::string> names;
    std::vector<int32_t> words;  // integers, or the bits of floats
    std::vector<PluginField> fields;

    explicit Attributes(const std::string& text) {
        std::istringstream parts(text);
        for (std::string part; std::getline(parts, part, ',');) {
            const std::size_t equals = part.find('=');
            const std::string value = part.substr(equals + 1);
            names.push_back(part.substr(0, equals));
            const bool real = value.find('.') != std::string::npos;
            const float number = std::strtof(value.c_str(), nullptr);
            words.push_back(std::atoi(value.c_str()));
            if (real) std::memcpy(&words.back(), &number, sizeof number);
            fields.push_back({nullptr, nullptr, real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1});
        }
        for (std::size_t i = 0; i < fields.size(); ++i) fields[i].name = names[i].c_str(), fields[i].data = &words[i];
    }
};

using Tensors = std::vector<PluginTensorDesc>;

// A profile as it comes with free axes: only the ends of their ranges, here one and the same, say what they may be.
std::vector<DynamicPluginTensorDesc> free_axes(const Tensors& tensors) {
    std::vector<DynamicPluginTensorDesc> profile(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        profile[i].desc = tensors[i];
        profile[i].min = profile[i].max = tensors[i].dims;
        if (tensors[i].dims.nbDims != 4) continue;
        for (const int32_t axis : {0, 2, 3}) profile[i].desc.dims.d[axis] = -1;
    }
    return profile;
}

#if NV_TENSORRT_MAJOR >= 10
bool supports(IPluginV3& plugin, const Tensors& tensors, int32_t position) {
    std::vector<DynamicPluginTensorDesc> dynamic(tensors.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) dynamic[i].desc = tensors[i];
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
    return build->supportsFormatCombination(position, dynamic.data(), static_cast<int32_t>(tensors.size()) - 1, 1);
}

void enqueue(IPluginV3& plugin, const Tensors& tensors, const void* const* inputs, void* const* outputs) {
    const auto count = static_cast<int32_t>(tensors.size()) - 1;
    const std::vector<DynamicPluginTensorDesc> profile = free_axes(tensors);
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::printf("configurePlugin %d\n", build->configurePlugin(profile.data(), count, &profile.back(), 1));
    const auto runtime_of = [](IPluginV3& node) {
        return static_cast<IPluginV3OneRuntime*>(node.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    };
    IPluginV3OneRuntime& runtime = *runtime_of(*runtime_of(plugin)->attachToContext(nullptr));
    std::printf("onShapeChange %d\n", runtime.onShapeChange(tensors.data(), count, &tensors.back(), 1));
    std::printf("enqueue %d\n", runtime.enqueue(tensors.data(), &tensors.back(), inputs, outputs, nullptr, nullptr));
}
#else
bool supports(IPluginV2& plugin, const Tensors& tensors, int32_t position) {
    const auto count = static_cast<int32_t>(tensors.size()) - 1;
    return static_cast<IPluginV2DynamicExt&>(plugin).supportsFormatCombination(position, tensors.data(), count, 1);
}

void enqueue(IPluginV2& plugin, const Tensors& tensors, const void* const* inputs, void* const* outputs) {
    const auto count = static_cast<int32_t>(tensors.size()) - 1;
    const std::vector<DynamicPluginTensorDesc> profile = free_axes(tensors);
    auto& node = *static_cast<IPluginV2DynamicExt&>(plugin).clone();
    node.configurePlugin(profile.data(), count, &profile.back(), 1);
    std::printf("enqueue %d\n", node.enqueue(tensors.data(), &tensors.back(), inputs, outputs, nullptr, nullptr));
}
#endif

// Runs the node on the tensors in the files.
template <class Plugin>
void enqueue_files(Plugin& plugin, Tensors tensors, const char* type, const char* format, char** files) {
    std::vector<std::vector<char>> bytes(tensors.size());
    std::vector<void*> data;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        tensors[i].type = static_cast<DataType>(std::atoi(type));
        tensors[i].format =
            tensors[i].dims.nbDims == 4 ? static_cast<TensorFormat>(std::atoi(format)) : TensorFormat::kLINEAR;
        std::ifstream file(files[i], std::ios::binary);
        bytes[i].assign(std::istreambuf_iterator<char>(file), {});
        data.push_back(bytes[i].data());
    }
    enqueue(plugin, tensors, data.data(), &data.back());
    std::ofstream(files[tensors.size() - 1], std::ios::binary)
        .write(bytes.back().data(), static_cast<std::streamsize>(bytes.back().size()));
}

// Prints every accepted combination of "type:format", asking as TensorRT does: tensors after `position` are garbage.
template <class Plugin>
void print_accepted(Plugin& plugin, Tensors tensors, std::size_t position, std::string line) {
    if (position == tensors.size()) return void(std::puts(line.c_str()));
    for (int32_t type = 0; type < EnumMax<DataType>(); ++type) {
        for (int32_t format = 0; format < EnumMax<TensorFormat>(); ++format) {
            tensors[position].type = static_cast<DataType>(type);
            tensors[position].format = static_cast<TensorFormat>(format);
            Tensors known = tensors;
            for (std::size_t i = position + 1; i < known.size(); ++i) std::memset(&known[i], 0x5a, sizeof known[i]);
            if (!supports(plugin, known, static_cast<int32_t>(position))) continue;
            print_accepted(plugin, tensors, position + 1,
                           line + (line.empty() ? "" : " ") + std::to_string(type) + ":" + std::to_string(format));
        }
    }
}

// One error of a node for each answer of the finder: two loggers, none, an exception.
void log_errors(const char* library, Creator& creator) {
    struct Logger : ILogger {
        explicit Logger(const char* name) : name(name) {}
        void log(Severity severity, const char* message) noexcept override {
            std::printf("%s %d %s\n", name, static_cast<int>(severity), message);
        }
        const char* name;
    } first("first"), second("second");
    struct Finder : ILoggerFinder {
        ILogger* findLogger() override {
            if (throws) throw 1;
            return logger;
        }
        ILogger* logger = nullptr;
        bool throws = false;
    } finder;
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(load(library), "setLoggerFinder"))(&finder);
    const auto fail = [&](const char* name, int32_t value) {
        const PluginField field{name, &value, PluginFieldType::kINT32, 1};
        const PluginFieldCollection fields{1, &field};
#if NV_TENSORRT_MAJOR >= 10
        creator.createPlugin("", &fields, TensorRTPhase::kBUILD);
#else
        creator.createPlugin("", &fields);
#endif
    };
    for (Logger* logger : {&first, &second, static_cast<Logger*>(nullptr)}) {
        finder.logger = logger;
        fail("num_heads", 0);
    }
    finder.throws = true;
    fail("stride", 0);
}

int main(int argc, char** argv) {
    Creator& creator = find_creator(argv[2], argv[3]);
    if (std::strcmp(argv[1], "log") == 0) return log_errors(argv[2], creator), 0;
    const Attributes attributes(argv[4]);
    PluginFieldCollection fields{static_cast<int32_t>(attributes.fields.size()), attributes.fields.data()};
#if NV_TENSORRT_MAJOR >= 10
    const auto create = [&](TensorRTPhase phase, const PluginFieldCollection* from) {
        return creator.createPlugin("", from, phase);
    };
    IPluginV3* const plugin = create(TensorRTPhase::kBUILD, &fields);
#else
    IPluginV2* const plugin = creator.createPlugin("", &fields);
#endif
    if (plugin == nullptr) return std::puts("not created"), 1;
    if (std::strcmp(argv[1], "formats") == 0) {
        Tensors tensors;
        for (int i = 5; i < argc; ++i) tensors.push_back(tensor(argv[i]));
        print_accepted(*plugin, tensors, 0, "");
        return 0;
    }
    if (std::strcmp(argv[1], "enqueue") == 0) {
        Tensors tensors;
        const int count = (argc - 7) / 2;
        for (int i = 7; i < 7 + count; ++i) tensors.push_back(tensor(argv[i]));
        enqueue_files(*plugin, tensors, argv[5], argv[6], argv + 7 + count);
        return 0;
    }
#if NV_TENSORRT_MAJOR >= 10
    if (std::strcmp(argv[1], "timing_cache_id") == 0) {
        auto* const build = plugin->getCapabilityInterface(PluginCapabilityType::kBUILD);
        return std::puts(static_cast<IPluginV3OneBuild*>(build)->getTimingCacheID()), 0;
    }
    const auto plan_of = [](IPluginV3& node) {
        return *static_cast<IPluginV3OneRuntime*>(node.getCapabilityInterface(PluginCapabilityType::kRUNTIME))
                    ->getFieldsToSerialize();
    };
    const auto text = [&](IPluginV3* node) {
        if (node == nullptr) return std::string("refused");
        const PluginFieldCollection plan = plan_of(*node);
        std::ostringstream out;
        for (const PluginField* f = plan.fields; f != plan.fields + plan.nbFields; ++f) {
            out << f->name << '=';
            f->type == PluginFieldType::kFLOAT32 ? out << *static_cast<const float*>(f->data)
                                                 : out << *static_cast<const int32_t*>(f->data);
            out << ' ';
        }
        return out.str();
    };
    const PluginFieldCollection plan = plan_of(*plugin);
    std::printf("plan: %s\n", text(plugin).c_str());
    std::printf("clone: %s\n", text(plugin->clone()).c_str());
    std::printf("read: %s\n", text(create(TensorRTPhase::kRUNTIME, &plan)).c_str());
    for (int32_t i = 0; i < plan.nbFields; ++i) {
        std::vector<PluginField> changed(plan.fields, plan.fields + plan.nbFields);
        changed.erase(changed.begin() + i);
        const PluginFieldCollection without{plan.nbFields - 1, changed.data()};
        std::printf("without %s: %s\n", plan.fields[i].name, text(create(TensorRTPhase::kRUNTIME, &without)).c_str());
    }
    std::vector<PluginField> changed(plan.fields, plan.fields + plan.nbFields);
    const int32_t other = 2;
    for (PluginField& field : changed) field.data = std::strcmp(field.name, "acmix_plan") ? field.data : &other;
    const PluginFieldCollection newer{plan.nbFields, changed.data()};
    std::printf("another version: %s\n", text(create(TensorRTPhase::kRUNTIME, &newer)).c_str());
#else
    if (std::strcmp(argv[1], "namespace") == 0) {
        for (const char* name : {"ours", static_cast<const char*>(nullptr)}) {
            creator.setPluginNamespace(name), plugin->setPluginNamespace(name);
            std::printf("'%s' '%s'\n", creator.getPluginNamespace(), plugin->getPluginNamespace());
        }
        return 0;
    }
    const auto text = [](IPluginV2* node) {
        if (node == nullptr) return std::string("refused");
        std::vector<std::uint32_t> words(node->getSerializationSize() / sizeof(std::uint32_t));
        node->serialize(words.data());
        std::ostringstream out;
        for (const std::uint32_t word : words) out << std::hex << word << ' ';
        return out.str();
    };
    std::vector<char> plan(plugin->getSerializationSize());
    plugin->serialize(plan.data());
    const auto read = [&](std::size_t size) { return text(creator.deserializePlugin("", plan.data(), size)); };
    std::printf("plan: %s\n", text(plugin).c_str());
    std::printf("clone: %s\n", text(static_cast<IPluginV2DynamicExt&>(*plugin).clone()).c_str());
    std::printf("read: %s\n", read(plan.size()).c_str());
    std::printf("cut off: %s\n", read(plan.size() - 1).c_str());
    plan[4] = 2;
    std::printf("another version: %s\n", read(plan.size()).c_str());
#endif
    return 0;
}
