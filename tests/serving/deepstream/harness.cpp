// Loads a parser as nvinfer does and calls it once:
//
//   harness LIBRARY FUNCTION boxes|masks WIDTH HEIGHT CLASSES THRESHOLDS < layers
//
// where THRESHOLDS are separated by commas and every line of the layers is NAME TYPE DIMS FILE; "-" is no name and no
// file, DIMS are separated by commas. Prints an object a line, with the size of its mask and the mask itself, and ends
// with 0 where the function gives true, 3 where it gives false.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <list>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "nvdsinfer_custom_impl.h"

template <typename Number>
std::vector<Number> numbers(const std::string& text) {
    std::vector<Number> found;
    std::stringstream stream(text);
    for (std::string one; std::getline(stream, one, ',');) {
        found.push_back(static_cast<Number>(std::stod(one)));
    }
    return found;
}

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_LAZY);
    if (!library) {
        std::cerr << "not loaded: " << dlerror() << std::endl;
        return 2;
    }
    void* const function = dlsym(library, arguments[2]);
    if (!function) {
        std::cerr << "not found: " << dlerror() << std::endl;
        return 2;
    }
    NvDsInferNetworkInfo network{};
    network.width = static_cast<unsigned int>(std::atoi(arguments[4]));
    network.height = static_cast<unsigned int>(std::atoi(arguments[5]));
    network.channels = 3;
    NvDsInferParseDetectionParams wanted;
    wanted.numClassesConfigured = static_cast<unsigned int>(std::atoi(arguments[6]));
    wanted.perClassPreclusterThreshold = numbers<float>(arguments[7]);

    std::vector<NvDsInferLayerInfo> layers;
    std::list<std::string> names;
    std::list<std::unique_ptr<char[]>> buffers;  // each as large as it has to be, which sanitizers watch
    std::string name, dims, file;
    for (int type; std::cin >> name >> type >> dims >> file;) {
        NvDsInferLayerInfo layer;
        std::memset(&layer, 0, sizeof(layer));
        layer.dataType = static_cast<NvDsInferDataType>(type);
        names.push_back(name);
        layer.layerName = name == "-" ? nullptr : names.back().c_str();
        layer.inferDims.numElements = 1;
        for (unsigned int size : numbers<unsigned int>(dims)) {
            layer.inferDims.d[layer.inferDims.numDims++] = size;
            layer.inferDims.numElements *= size;
        }
        if (file != "-") {
            std::ifstream stream(file, std::ios::binary);
            const std::string bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
            buffers.emplace_back(new char[bytes.size()]);
            std::memcpy(buffers.back().get(), bytes.data(), bytes.size());
            layer.buffer = buffers.back().get();
        }
        layers.push_back(layer);
    }

    if (!std::strcmp(arguments[3], "boxes")) {
        std::vector<NvDsInferObjectDetectionInfo> objects;
        if (!reinterpret_cast<NvDsInferParseCustomFunc>(function)(layers, network, wanted, objects)) return 3;
        for (const auto& box : objects) {
            std::printf("%u %.9g %.9g %.9g %.9g %.9g\n", box.classId, double(box.left), double(box.top),
                        double(box.width), double(box.height), double(box.detectionConfidence));
        }
    } else {
        std::vector<NvDsInferInstanceMaskInfo> objects;
        const auto parse = reinterpret_cast<NvDsInferInstanceMaskParseCustomFunc>(function);
        if (!parse(layers, network, wanted, objects)) return 3;
        for (const auto& box : objects) {
            std::printf("%u %.9g %.9g %.9g %.9g %.9g", box.classId, double(box.left), double(box.top),
                        double(box.width), double(box.height), double(box.detectionConfidence));
            std::printf(" %u %u", box.mask_height, box.mask_width);
            if (box.mask_size != sizeof(float) * box.mask_width * box.mask_height) return 4;
            for (unsigned int pixel = 0; pixel < box.mask_width * box.mask_height; ++pixel) {
                std::printf(" %.6g", double(box.mask[pixel]));
            }
            std::printf("\n");
            delete[] box.mask;
        }
    }
    dlclose(library);
    return 0;
}
