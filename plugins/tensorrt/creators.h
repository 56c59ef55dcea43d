// What the library brings to TensorRT, for checks from outside.
#pragma once

#include "acmix/c_api.h"

extern "C" {

// One JSON object: {"tensorrt": "10.13.0", "creators": [{"name", "version", "namespace", "interface"}]}, where
// "tensorrt" is the version that the library was compiled for.
ACMIX_EXPORT const char* acmix_creators();
}
