"""Every kernel compiles with the compiler of CUDA 11.8, which knows sm_72 and is the closest to JetPack 5's on PyPI.

ACMIX_NVRTC    folder with `pip install --target FOLDER nvidia-cuda-nvrtc-cu11 nvidia-cuda-runtime-cu11`
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest

from tests import ROOT

PLUGINS = ROOT / "plugins"
SOURCES = sorted((PLUGINS / "src").glob("*.cu"))
# Launchers are compiled for the device too: they are what instantiates kernels, and a compiler at run time has no host.
FLAGS = ("-std=c++17", "-default-device", "-rdc=true")

STANDARD_LIBRARY = """
#ifndef STANDARD_LIBRARY
#define STANDARD_LIBRARY
#define INFINITY __int_as_float(0x7f800000)
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
namespace std {
using size_t = decltype(sizeof 0);
using uintptr_t = size_t;
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
template <bool, class T, class> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool kTest, class T, class F> using conditional_t = typename conditional<kTest, T, F>::type;
template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using decay_t = remove_const_t<T>;  // of what is passed by value
template <class T, class U> inline constexpr bool is_same_v = false;
template <class T> inline constexpr bool is_same_v<T, T> = true;
template <class T, T kValue> struct integral_constant { constexpr operator T() const { return kValue; } };
template <class> struct numeric_limits;
template <> struct numeric_limits<float> { static constexpr float lowest() { return -FLT_MAX; } };
template <class... T> struct tuple { constexpr tuple(T...) {} };
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }
template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T, size_t kSize> constexpr T* begin(T (&array)[kSize]) { return array; }
template <class T, size_t kSize> constexpr T* end(T (&array)[kSize]) { return array + kSize; }
template <class T, size_t kSize> constexpr size_t size(T (&)[kSize]) { return kSize; }
template <class T> constexpr T prev(T it) { return --it; }
using ::fabs;
}  // namespace std
#endif
"""
"""As much of it as the kernels use."""


@pytest.fixture(scope="module")
def packages():
    folder = os.environ.get("ACMIX_NVRTC") or pytest.skip("no NVRTC: name its folder in ACMIX_NVRTC")
    return Path(folder) / "nvidia"


@pytest.fixture(scope="module")
def nvrtc(packages):
    (library,) = packages.glob("cuda_nvrtc/lib/libnvrtc.so.*")
    return ctypes.CDLL(str(library))


def text(nvrtc, program, what):
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()


def strings(values):
    return (ctypes.c_char_p * len(values))(*[value.encode() for value in values])


@pytest.mark.parametrize("sm", [72, 75, 87])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_compile(packages, nvrtc, source, sm):
    headers = [*(PLUGINS / "include/acmix").iterdir(), *(PLUGINS / "src").iterdir()]
    standard = sorted({name for path in headers for name in re.findall(r"#include <(\w+)>", path.read_text())})
    program = ctypes.c_void_p()
    contents = strings([STANDARD_LIBRARY] * len(standard))
    code = source.read_text()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), code.encode(), source.name.encode(), len(standard), contents, strings(standard)
    )
    assert created == 0
    folders = [f"-I{folder}" for folder in (PLUGINS / "include", packages / "cuda_runtime/include")]
    options = [f"--gpu-architecture=sm_{sm}", *FLAGS, *folders]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    assert not failed, text(nvrtc, program, "ProgramLog")
    launchers = code.count("template cudaError_t")
    assert len(set(re.findall(r"\.entry (\w+)", text(nvrtc, program, "PTX")))) >= launchers > 0
