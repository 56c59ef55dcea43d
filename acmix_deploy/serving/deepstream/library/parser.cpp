// From the outputs of the model in model.h to DeepStream's objects. nvinfer loads this library before the engine, calls
// one of the two functions at the end for each frame, and clusters what they give as its configuration says.
//
// Outputs that the model never gives are refused: the function says why on stderr and returns false, which ends the
// pipeline. A box that is not finite is left out where its score does not count.

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "model.h"
#include "nvdsinfer_custom_impl.h"

namespace {

using Layers = std::vector<NvDsInferLayerInfo>;

constexpr bool anchors = acmix::layout == acmix::Layout::anchors;
constexpr bool ranked = acmix::layout == acmix::Layout::rows || acmix::layout == acmix::Layout::ranked_queries;
constexpr bool shares = acmix::layout == acmix::Layout::queries || acmix::layout == acmix::Layout::ranked_queries;
constexpr bool selected = ranked || shares;
constexpr size_t first_score = acmix::layout == acmix::Layout::objectness ? 5 : 4;
constexpr size_t first_extra = ranked ? 6 : first_score + acmix::classes;
constexpr size_t values = first_extra + acmix::extra;
constexpr float rounding = 0.01f;  // beyond [0, 1] that a score may lie

// Loads the library beside this one that has the model's TensorRT layers, which register when it is loaded.
struct Plugin {
    Plugin() {
        const std::string name = acmix::plugin;
        Dl_info here;
        if (name.empty() || !dladdr(reinterpret_cast<const void*>(&acmix::plugin), &here)) {
            return;
        }
        const std::string path = here.dli_fname;
        const size_t slash = path.rfind('/');
        const std::string beside = (slash == std::string::npos ? std::string("./") : path.substr(0, slash + 1)) + name;
        // Never closed, since TensorRT keeps pointers into it.
        if (!dlopen(beside.c_str(), RTLD_NOW)) {
            const char* why = dlerror();
            std::cerr << "acmix: the plugin cannot be loaded: " << (why ? why : beside) << std::endl;
        }
    }
};

const Plugin plugin;

bool refuse(const std::string& why) {
    std::cerr << "acmix: " << why << std::endl;
    return false;
}

std::string shape(const NvDsInferDims& dims) {
    std::ostringstream text;
    text << '[';
    for (unsigned int axis = 0; axis < std::min<unsigned int>(dims.numDims, NVDSINFER_MAX_DIMS); ++axis) {
        text << (axis ? ", " : "") << dims.d[axis];
    }
    text << ']';
    return text.str();
}

// The float output of that name, of that many axes; null where there is none, which is then said.
const NvDsInferLayerInfo* output(const Layers& layers, const std::string& name, unsigned int axes) {
    std::string others;
    for (const NvDsInferLayerInfo& layer : layers) {
        if (!layer.layerName || name != layer.layerName) {
            others +=
                (others.empty() ? "" : ", ") + std::string(layer.layerName ? layer.layerName : "one without a name");
            continue;
        }
        if (layer.dataType != FLOAT) {
            refuse("the output " + name + " is not in float32 (NvDsInferDataType " +
                   std::to_string(int(layer.dataType)) + ")");
        } else if (layer.inferDims.numDims != axes) {
            refuse("the output " + name + " is " + shape(layer.inferDims) + ", and " + std::to_string(axes) +
                   " axes are expected");
        } else if (!layer.buffer) {
            refuse("the output " + name + " has no buffer");
        } else {
            return &layer;
        }
        return nullptr;
    }
    refuse("there is no output " + name + (others.empty() ? "" : ", but " + others));
    return nullptr;
}

struct Box {
    float score;
    unsigned int kind;
    float left, top, right, bottom;  // in pixels of the network
    size_t row;
};

// The values of one box, wherever they lie.
class Rows {
 public:
    Rows(const NvDsInferLayerInfo& layer)
        : data_(static_cast<const float*>(layer.buffer)),
          count_(layer.inferDims.d[anchors ? 1 : 0]),
          width_(layer.inferDims.d[anchors ? 0 : 1]) {}
    size_t count() const { return count_; }
    size_t width() const { return width_; }
    float operator()(size_t row, size_t value) const {
        return data_[anchors ? value * count_ + row : row * width_ + value];
    }

 private:
    const float* data_;
    size_t count_, width_;
};

// What is in the image above the thresholds; false where the output cannot be what the model gives.
bool boxes_of(const NvDsInferLayerInfo& layer, const NvDsInferNetworkInfo& network,
              const NvDsInferParseDetectionParams& wanted, std::vector<Box>& found) {
    const Rows rows(layer);
    const auto& thresholds = wanted.perClassPreclusterThreshold;
    if (rows.width() != values) {
        return refuse("the output " + std::string(acmix::output) + " is " + shape(layer.inferDims) + ", and a box of " +
                      std::to_string(acmix::classes) + " classes has " + std::to_string(values) + " values");
    }
    if (wanted.numClassesConfigured != acmix::classes || thresholds.size() < acmix::classes) {
        return refuse("num-detected-classes is " + std::to_string(wanted.numClassesConfigured) + " with " +
                      std::to_string(thresholds.size()) + " thresholds, and the model has " +
                      std::to_string(acmix::classes) + " classes");
    }
    if (!network.width || !network.height) {
        return refuse("the network's size is not told");
    }
    const float width = static_cast<float>(network.width), height = static_cast<float>(network.height);
    for (size_t row = 0; row < rows.count(); ++row) {
        float score = rows(row, 4);
        size_t kind = 0;
        if (!ranked) {
            const float weight = acmix::layout == acmix::Layout::objectness ? score : 1.0f;
            score = rows(row, first_score) * weight;
            bool known = !std::isnan(score);
            for (size_t other = 1; other < acmix::classes; ++other) {
                const float one = rows(row, first_score + other) * weight;
                known = known && !std::isnan(one);
                if (one > score) {
                    score = one;
                    kind = other;
                }
            }
            if (!known) {
                return refuse("the output " + std::string(acmix::output) + " has scores that are not finite");
            }
        }
        if (!(score >= -rounding && score <= 1.0f + rounding)) {
            return refuse("the output " + std::string(acmix::output) + " has the score " + std::to_string(score) +
                          ", and scores are 0 to 1");
        }
        if (ranked) {
            const float told = rows(row, 5);
            const float least = *std::min_element(thresholds.begin(), thresholds.begin() + acmix::classes);
            if (!(score > least)) {
                continue;
            }
            if (!(told >= 0.0f && told < static_cast<float>(acmix::classes) && told == std::floor(told))) {
                return refuse("the output " + std::string(acmix::output) + " has the class " + std::to_string(told) +
                              ", and classes are 0 to " + std::to_string(acmix::classes - 1));
            }
            kind = static_cast<size_t>(told);
        }
        if (!(score > thresholds[kind])) {
            continue;
        }
        for (size_t value = 0; value < values; ++value) {
            if (!std::isfinite(rows(row, value))) {
                return refuse("the output " + std::string(acmix::output) +
                              " has a box that is not finite, of the score " + std::to_string(score));
            }
        }
        float edges[4] = {rows(row, 0), rows(row, 1), rows(row, 2), rows(row, 3)};
        if (acmix::layout != acmix::Layout::rows) {  // centre and size
            const float x = edges[0], y = edges[1], half_width = edges[2] / 2, half_height = edges[3] / 2;
            edges[0] = x - half_width;
            edges[1] = y - half_height;
            edges[2] = x + half_width;
            edges[3] = y + half_height;
        }
        if (shares) {
            for (int edge = 0; edge < 4; ++edge) {
                edges[edge] *= edge % 2 ? height : width;
            }
        }
        Box box{score, static_cast<unsigned int>(kind), 0, 0, 0, 0, row};
        box.left = std::min(std::max(edges[0], 0.0f), width);
        box.top = std::min(std::max(edges[1], 0.0f), height);
        box.right = std::min(std::max(edges[2], 0.0f), width);
        box.bottom = std::min(std::max(edges[3], 0.0f), height);
        found.push_back(box);
    }
    return true;
}

float overlap(const Box& one, const Box& other) {
    const float width = std::min(one.right, other.right) - std::max(one.left, other.left);
    const float height = std::min(one.bottom, other.bottom) - std::max(one.top, other.top);
    if (width <= 0 || height <= 0) {
        return 0;
    }
    const float area = (one.right - one.left) * (one.bottom - one.top);
    const float other_area = (other.right - other.left) * (other.bottom - other.top);
    return width * height / (area + other_area - width * height);
}

// The boxes that stay, the best first: of two of one class that overlap by more the better one.
void suppress(std::vector<Box>& boxes) {
    std::stable_sort(boxes.begin(), boxes.end(),
                     [](const Box& one, const Box& other) { return one.score > other.score; });
    std::vector<Box> kept;
    for (const Box& box : boxes) {
        const bool hidden = !selected && std::any_of(kept.begin(), kept.end(), [&](const Box& better) {
            return better.kind == box.kind && overlap(better, box) > acmix::iou;
        });
        if (!hidden) {
            kept.push_back(box);
        }
        if (kept.size() == acmix::most) {
            break;
        }
    }
    boxes.swap(kept);
}

// How likely each pixel of a box is of its object. nvinfer frees it with delete[].
float* mask_of(const Rows& rows, const Box& box, const NvDsInferLayerInfo& prototypes,
               const NvDsInferNetworkInfo& network, unsigned int& width, unsigned int& height) {
    const size_t lines = prototypes.inferDims.d[1], columns = prototypes.inferDims.d[2];
    const float across = static_cast<float>(columns) / static_cast<float>(network.width);
    const float down = static_cast<float>(lines) / static_cast<float>(network.height);
    const float left = box.left * across, top = box.top * down;
    const float wide = (box.right - box.left) * across, tall = (box.bottom - box.top) * down;
    // Twice as fine as the prototypes, which the display enlarges to the box.
    width = static_cast<unsigned int>(std::ceil(std::max(2 * wide, 1.0f)));
    height = static_cast<unsigned int>(std::ceil(std::max(2 * tall, 1.0f)));
    const size_t from_line = static_cast<size_t>(std::max(std::floor(top - 0.5f), 0.0f));
    const size_t to_line = std::min(static_cast<size_t>(std::max(std::ceil(top + tall + 0.5f), 0.0f)), lines - 1);
    const size_t from_column = static_cast<size_t>(std::max(std::floor(left - 0.5f), 0.0f));
    const size_t to_column = std::min(static_cast<size_t>(std::max(std::ceil(left + wide + 0.5f), 0.0f)), columns - 1);
    const size_t first_line = std::min(from_line, lines - 1), first_column = std::min(from_column, columns - 1);
    const size_t span = to_column - first_column + 1;
    std::vector<float> sums((to_line - first_line + 1) * span, 0.0f);
    const float* data = static_cast<const float*>(prototypes.buffer);
    for (size_t value = 0; value < acmix::extra; ++value) {
        const float weight = rows(box.row, first_extra + value);
        for (size_t line = first_line; line <= to_line; ++line) {
            const float* from = data + (value * lines + line) * columns + first_column;
            float* to = sums.data() + (line - first_line) * span;
            for (size_t column = 0; column < span; ++column) {
                to[column] += weight * from[column];
            }
        }
    }
    const auto place = [](float at, size_t low, size_t high) {
        return std::min(std::max(at, static_cast<float>(low)), static_cast<float>(high));
    };
    float* mask = new float[static_cast<size_t>(width) * height];
    for (unsigned int line = 0; line < height; ++line) {
        const float y = place(top + (static_cast<float>(line) + 0.5f) * tall / static_cast<float>(height) - 0.5f,
                              first_line, to_line);
        const size_t y0 = static_cast<size_t>(y), y1 = std::min(y0 + 1, to_line);
        for (unsigned int column = 0; column < width; ++column) {
            const float x = place(left + (static_cast<float>(column) + 0.5f) * wide / static_cast<float>(width) - 0.5f,
                                  first_column, to_column);
            const size_t x0 = static_cast<size_t>(x), x1 = std::min(x0 + 1, to_column);
            const auto sum = [&](size_t at_y, size_t at_x) {
                return sums[(at_y - first_line) * span + at_x - first_column];
            };
            const float part = x - static_cast<float>(x0), rest = y - static_cast<float>(y0);
            const float upper = sum(y0, x0) + (sum(y0, x1) - sum(y0, x0)) * part;
            const float lower = sum(y1, x0) + (sum(y1, x1) - sum(y1, x0)) * part;
            mask[static_cast<size_t>(line) * width + column] =
                1.0f / (1.0f + std::exp(-(upper + (lower - upper) * rest)));
        }
    }
    return mask;
}

template <typename Object>
Object object_of(const Box& box) {
    Object object{};
    object.classId = box.kind;
    object.left = box.left;
    object.top = box.top;
    object.width = std::max(box.right - box.left, 0.0f);
    object.height = std::max(box.bottom - box.top, 0.0f);
    object.detectionConfidence = std::min(std::max(box.score, 0.0f), 1.0f);
    return object;
}

}  // namespace

// Boxes, which nvinfer clusters.
extern "C" bool NvDsInferParseAcmix(std::vector<NvDsInferLayerInfo> const& layers, NvDsInferNetworkInfo const& network,
                                    NvDsInferParseDetectionParams const& wanted,
                                    std::vector<NvDsInferObjectDetectionInfo>& objects) {
    const NvDsInferLayerInfo* layer = output(layers, acmix::output, 2);
    std::vector<Box> boxes;
    if (!layer || !boxes_of(*layer, network, wanted, boxes)) {
        return false;
    }
    for (const Box& box : boxes) {
        objects.push_back(object_of<NvDsInferObjectDetectionInfo>(box));
    }
    return true;
}

// Boxes with masks, free of overlaps, since nvinfer clusters none that have masks.
extern "C" bool NvDsInferParseAcmixMasks(std::vector<NvDsInferLayerInfo> const& layers,
                                         NvDsInferNetworkInfo const& network,
                                         NvDsInferParseDetectionParams const& wanted,
                                         std::vector<NvDsInferInstanceMaskInfo>& objects) {
    const NvDsInferLayerInfo* layer = output(layers, acmix::output, 2);
    const NvDsInferLayerInfo* prototypes = layer ? output(layers, acmix::prototypes, 3) : nullptr;
    std::vector<Box> boxes;
    if (!prototypes || !boxes_of(*layer, network, wanted, boxes)) {
        return false;
    }
    const NvDsInferDims& dims = prototypes->inferDims;
    if (dims.d[0] != acmix::extra || !dims.d[1] || !dims.d[2]) {
        return refuse("the output " + std::string(acmix::prototypes) + " is " + shape(dims) + ", and " +
                      std::to_string(acmix::extra) + " masks are expected");
    }
    suppress(boxes);
    const float* data = static_cast<const float*>(prototypes->buffer);
    const size_t size = static_cast<size_t>(dims.d[0]) * dims.d[1] * dims.d[2];
    if (!boxes.empty() && !std::all_of(data, data + size, [](float value) { return std::isfinite(value); })) {
        return refuse("the output " + std::string(acmix::prototypes) + " has values that are not finite");
    }
    for (const Box& box : boxes) {
        NvDsInferInstanceMaskInfo object = object_of<NvDsInferInstanceMaskInfo>(box);
        object.mask = mask_of(Rows(*layer), box, *prototypes, network, object.mask_width, object.mask_height);
        object.mask_size = static_cast<unsigned int>(sizeof(float)) * object.mask_width * object.mask_height;
        objects.push_back(object);
    }
    return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseAcmix);
CHECK_CUSTOM_INSTANCE_MASK_PARSE_FUNC_PROTOTYPE(NvDsInferParseAcmixMasks);
