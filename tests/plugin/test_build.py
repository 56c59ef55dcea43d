"""The plugin is built by one command from what the machine has, and what is missing is named in one sentence."""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from acmix_deploy import __version__
from acmix_deploy.cli import main
from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.operators import OPERATORS
from acmix_deploy.plugin import toolchain
from acmix_deploy.plugin.build import build
from acmix_deploy.plugin.library import check, describe, installed_tensorrt
from acmix_deploy.plugin.toolchain import check_architectures, find_cmake, find_cuda, find_tensorrt
from tests import ROOT

PLUGINS = ROOT / "plugins"
BUILD = sys.modules["acmix_deploy.plugin.build"]


@pytest.fixture(scope="module")
def cuda():
    try:
        return find_cuda()
    except MissingComponent as missing:
        pytest.skip(missing.message)


@pytest.fixture(scope="module")
def headers():
    folder = os.environ.get("ACMIX_TENSORRT_HEADERS") or pytest.skip("ACMIX_TENSORRT_HEADERS names no header sets")
    sets = [find_tensorrt(path) for path in Path(folder).expanduser().iterdir()]
    return max(sets, key=lambda found: found.version)


@pytest.fixture(scope="module")
def built(cuda, headers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "new"
    steps = []
    library = build(folder, tensorrt=headers.include, architectures=[87], progress=steps.append)
    assert [path.name for path in folder.iterdir()] == ["libacmix_plugin.so"]
    assert steps[0].startswith(f"configuring for TensorRT {headers}")
    assert any(re.fullmatch(r"compiling, \d+%", step) for step in steps)
    return library


def test_build(built, cuda, headers, monkeypatch, capsys):
    monkeypatch.setattr("acmix_deploy.plugin.library.installed_tensorrt", dict)
    assert (built.version, built.cuda, built.tensorrt) == (__version__, cuda.version, str(headers))
    assert built.architectures == "sm_87 compute_87"
    assert [creator.name for creator in built.creators] == [operator.op_type for operator in OPERATORS]
    assert {entry.operator for entry in built.entries} == {operator.op_type for operator in OPERATORS}
    largest = {operator.op_type: max(operator.kernel_limits.get("head_dim", [0])) for operator in OPERATORS}
    assert {entry.operator: entry.head_dim for entry in built.entries} == largest
    assert main(["plugin", "check", str(built.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"document": "plugin", "schema": 1, **built.model_dump(mode="json")}
    assert main(["plugin", "check", str(built.path)]) == 0
    assert "sm_87 compute_87" in capsys.readouterr().out


def test_built_library_shows_its_entry_points_alone(built):
    nm = shutil.which("nm") or pytest.skip("nm is not installed")
    symbols = subprocess.run(
        [nm, "-D", "--defined-only", built.path], check=True, capture_output=True, text=True
    ).stdout
    names = set(re.findall(r"\S+$", symbols, re.M))
    entry_points = {"acmix_describe", "acmix_creators", *(f"acmix_{operator.name}" for operator in OPERATORS)}
    assert names - {"getCreators", "getPluginCreators", "setLoggerFinder"} == entry_points
    needed = subprocess.run(["ldd", built.path], check=True, capture_output=True, text=True).stdout
    assert not re.search("nvinfer|cudart|tensorrt", needed)


def test_another_tensorrt(built, monkeypatch, capsys):
    library = "acmix_deploy.plugin.library.installed_tensorrt"
    monkeypatch.setattr(library, lambda: {"libnvinfer.so.7": 7, "Python package tensorrt": 6})
    assert main(["plugin", "check", str(built.path)]) == 3
    error = capsys.readouterr().err
    assert f"built for TensorRT {built.tensorrt.split('.')[0]}" in error
    assert "installed here is 7 (libnvinfer.so.7), 6 (Python package tensorrt)" in error
    monkeypatch.setattr(library, lambda: {"a": 7, "b": int(built.tensorrt.split(".")[0])})
    check(built.path)


def test_installed_tensorrt(monkeypatch):
    versions = {"tensorrt-cu13": "11.1.0.106"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(ctypes.util, "find_library", {"nvinfer": "libnvinfer.so.10"}.get)
    assert installed_tensorrt() == {"libnvinfer.so.10": 10, "Python package tensorrt-cu13": 11}
    versions.clear()
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert installed_tensorrt() == {}


ANSWER = '{"version": "0", "cuda": "13.0", "architectures": "sm_87", "entries": []}'
FUNCTIONS = f"""
extern "C" const char* acmix_describe() {{ return R"({ANSWER})"; }}
extern "C" const char* acmix_creators() {{ return R"({{"tensorrt": "10.3.0", "creators": []}})"; }}
"""
LIBRARIES = {
    "understood": (FUNCTIONS, None, ""),
    "another library": ("int nothing;", UserError, "is no plugin that loads here: it has no acmix_describe"),
    "without TensorRT": (FUNCTIONS.replace("acmix_creators", "other"), UserError, "it has no acmix_creators"),
    "unresolved symbol": (FUNCTIONS + "void gone(); struct A { A() { gone(); } } a;", UserError, "undefined symbol"),
    "crash": (FUNCTIONS + "struct A { A() { __builtin_trap(); } } a;", CheckFailed, "ended the process that loaded it"),
    "another form": (FUNCTIONS.replace('"cuda"', '"CUDA"'), CheckFailed, "does not understand"),
    "not JSON": (FUNCTIONS.replace(ANSWER, "hello"), CheckFailed, "does not understand"),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_that_are_no_plugin(name, tmp_path):
    compiler = shutil.which("g++") or pytest.skip("g++ is not installed")
    source, error, words = LIBRARIES[name]
    (tmp_path / "lib.cpp").write_text(source)
    library = tmp_path / "lib.so"
    subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "lib.cpp", "-o", library], check=True)
    if error is None:
        assert describe(library).tensorrt == "10.3.0"
        return
    with pytest.raises(error, match=words):
        describe(library)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"text", "is a text file that begins with 'text'; a shared library is needed"),
        (b"\x7fELF and no more", "is no plugin that loads here"),
    ],
)
def test_files_that_are_no_library(content, words, tmp_path, capsys):
    if content:
        (tmp_path / "lib.so").write_bytes(content)
    assert main(["plugin", "check", str(tmp_path / "lib.so")]) == 2
    assert words in capsys.readouterr().err


# Finding CUDA


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without CUDA: no variable, nothing on the PATH but a shell, no /usr/local/cuda, no package."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(toolchain, "_CUDA", tmp_path / "nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_no_cuda(bare, capsys):
    assert main(["plugin", "build", "--tensorrt", "somewhere"]) == 3
    error = capsys.readouterr().err
    assert "nvcc was looked for in CUDA_HOME, on the PATH, in /usr/local/cuda and among the Python packages" in error
    assert "pip install nvidia-cuda-nvcc" in error


@pytest.mark.parametrize("place", ["CUDA_HOME", "PATH", "/usr/local/cuda", "packages"])
def test_cuda_is_found_in(place, cuda, bare, monkeypatch):
    path = os.pathsep.join([str(bare / "bin"), "/usr/bin", "/bin"])
    monkeypatch.setenv("PATH", path)
    home = bare / "site" / "nvidia" / "cu13" if place == "packages" else bare / "toolkit"
    wrapper = program(home / "bin" / "nvcc", f'exec {cuda.nvcc} "$@"')
    if place == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(home))
    elif place == "PATH":
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{path}")
    elif place == "/usr/local/cuda":
        monkeypatch.setattr(toolchain, "_CUDA", home)
    else:
        package = type("Spec", (), {"submodule_search_locations": [str(bare / "site" / "nvidia")]})
        monkeypatch.setattr("importlib.util.find_spec", {"nvidia": package}.get)
    found = find_cuda()
    assert found.nvcc == wrapper
    assert (found.version, found.architectures) == (cuda.version, cuda.architectures)
    assert any((folder / "cuda_fp16.h").is_file() for folder in found.includes)
    assert 87 in found.architectures


def test_cuda_that_does_not_work(bare):
    nvcc = program(bare / "bin" / "nvcc", "exit 1")
    with pytest.raises(MissingComponent, match="nvcc --dryrun failed"):
        find_cuda()
    program(
        nvcc, 'case "$*" in *probe.cu*) echo "sh: 1: cicc: not found" >&2; exit 1;; *) echo release 12.9, sm_87;; esac'
    )
    with pytest.raises(MissingComponent, match="nvcc was found and does not work: sh: 1: cicc: not found"):
        find_cuda()
    program(nvcc, 'case "$*" in *probe.cu*) exit 127;; *) echo release 12.9, sm_87;; esac')
    with pytest.raises(MissingComponent, match="nvcc was found and does not work: exit code 127"):
        find_cuda()
    nvcc.write_text("no program")
    with pytest.raises(MissingComponent, match="does not run"):
        find_cuda()


def test_unknown_architecture(cuda, headers, capsys, tmp_path):
    check_architectures([75, 87], cuda)
    command = [
        "plugin",
        "build",
        "--tensorrt",
        str(headers.include),
        "--arch",
        "87,sm_70",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 3
    assert re.search(r"CUDA [\d.]+ does not know sm_70; it knows sm_75, sm_80", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# Finding TensorRT

OLD = "#define NV_TENSORRT_MAJOR 8 //!< major\n#define NV_TENSORRT_MINOR {}\n#define NV_TENSORRT_PATCH 2\n"
NEW = """
#define TRT_MAJOR_ENTERPRISE 10
#define TRT_MINOR_ENTERPRISE 13
#define TRT_PATCH_ENTERPRISE 3
#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.
#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE
#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE
"""


@pytest.mark.parametrize("folder", [".", "include", "include/aarch64-linux-gnu", "include/x86_64-linux-gnu"])
@pytest.mark.parametrize(("text", "version"), [(OLD.format(5), (8, 5, 2)), (NEW, (10, 13, 3))])
def test_headers_are_found(folder, text, version, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "NvInferVersion.h").write_text(text)
    found = find_tensorrt(tmp_path)
    assert (found.include, found.version) == (tmp_path / folder, version)
    monkeypatch.setattr(toolchain, "_TENSORRT_PLACES", (tmp_path / "nothing here", tmp_path))
    assert find_tensorrt() == found
    monkeypatch.chdir(tmp_path)
    assert find_tensorrt(Path()) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "NvInferVersion.h of TensorRT was looked for in {} and the include folders there, and not found"),
        (OLD.format(4), "the headers in {} are of TensorRT 8.4.2; 8.5 or newer is needed"),
        ("", "NvInferVersion.h does not say which TensorRT"),
    ],
)
def test_headers_that_do_not_serve(text, words, tmp_path):
    if text is not None:
        (tmp_path / "NvInferVersion.h").write_text(text)
    with pytest.raises(MissingComponent, match=re.escape(words.format(tmp_path))):
        find_tensorrt(tmp_path)


def test_every_header_set_at_hand_is_read(headers):
    folder = Path(os.environ["ACMIX_TENSORRT_HEADERS"]).expanduser()
    for path in folder.iterdir():
        named = path.name.removeprefix("v").split(".")
        assert str(find_tensorrt(path)).split(".")[: len(named)] == named


# Building


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "cmake was looked for on the PATH"), ("3.16.3", "cmake version 3.16.3; 3.18 or newer is needed")],
)
def test_cmake_that_does_not_serve(version, words, bare, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(bare / "python"))
    if version:
        program(bare / "bin" / "cmake", f"echo cmake version {version}")
    with pytest.raises(MissingComponent, match=words):
        find_cmake()


def test_no_compiler(bare):
    program(bare / "bin" / "cmake", "echo cmake version 3.25.1")
    with pytest.raises(MissingComponent, match="make was looked for on the PATH"):
        find_cmake()
    program(bare / "bin" / "make", "")
    program(bare / "bin" / "c++", "")
    assert find_cmake() == bare / "bin" / "cmake"


def test_failing_compilation_leaves_nothing(cuda, headers, tmp_path, monkeypatch):
    shutil.copytree(PLUGINS, tmp_path / "plugins", ignore=shutil.ignore_patterns("*.cu", "*.cpp"))
    (tmp_path / "plugins/src/broken.cu").write_text("__global__ void broken() { undeclared = 1; }\n")
    monkeypatch.setattr(BUILD, "SOURCES", tmp_path / "plugins")
    with pytest.raises(CheckFailed, match="undeclared") as failure:
        build(tmp_path / "out", tensorrt=headers.include, architectures=[87])
    assert failure.value.message.startswith("the plugin does not compile:\n")
    assert list((tmp_path / "out").iterdir()) == []


def configure(folder, *options, path=None, sources=PLUGINS):
    """What CMake alone says of the sources and writes into the commands of the compilers, without our Python."""
    command = [shutil.which("cmake") or pytest.skip("cmake is not installed"), "-S", sources, "-B", folder, *options]
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.stdout + done.stderr, compiled_with(folder) if not done.returncode else ""


def compiled_with(folder):
    (rules,) = folder.glob("CMakeFiles/acmix_*.dir/flags.make")
    return rules.read_text()


MAKE = ("-DACMIX_TENSORRT=OFF", "-G", "Unix Makefiles")


@pytest.fixture(scope="module")
def configured(cuda, tmp_path_factory):
    """What CMake says of the kernels alone, and the commands of the compilers, where nvidia-smi names three devices."""
    folder = tmp_path_factory.mktemp("configured")
    program(folder / "bin" / "nvidia-smi", "echo 8.7; echo 9.0; echo 8.7")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return configure(folder / "kernels", f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}", *MAKE, path=path)


def test_cmake_alone(configured):
    """Without TensorRT it is the kernels alone, for the device at hand."""
    said, rules = configured
    assert "the kernels and their C interface alone" in said
    assert "architectures: sm_87 sm_90 compute_90" in said
    assert f'ACMIX_VERSION=\\"{__version__}\\"' in rules
    targets = set(re.findall(r"code=\[(.*?)\]", rules))
    assert targets == {"sm_87", "sm_90", "compute_90"}


def test_digest_of_the_sources(cuda, configured, tmp_path):
    """The same wherever they are; another one, of the next build, where a kernel was edited."""
    copy = shutil.copytree(PLUGINS, tmp_path / "copy")

    def digest(rules):
        return re.search(r'ACMIX_SOURCES=\\"([0-9a-f]{12})\\"', rules)[1]

    options = (f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}", "-DCMAKE_CUDA_ARCHITECTURES=87", *MAKE)
    first = digest(configured[1])
    assert digest(configure(copy / "b", *options, sources=copy)[1]) == first
    with (copy / "include/acmix/ptx.cuh").open("a") as kernels:
        kernels.write("// faster\n")
    subprocess.run(["cmake", "--build", copy / "b", "--target", "cmake_check_build_system"], check=True)
    assert digest(compiled_with(copy / "b")) != first


def test_cmake_without_the_headers(cuda, tmp_path):
    said, _ = configure(tmp_path / "b", f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}", f"-DACMIX_TENSORRT={tmp_path}")
    assert "NvInferVersion.h was looked for in" in said


def test_wheel_holds_the_sources(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("acmix_deploy", "plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", "wheel"], check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("acmix_deploy/plugin/native/")}
    sources = [PLUGINS / "CMakeLists.txt", PLUGINS / "exports.map"]
    sources += [
        path for name in ("include", "src", "tensorrt") for path in (PLUGINS / name).rglob("*") if path.is_file()
    ]
    assert packed == {f"acmix_deploy/plugin/native/{path.relative_to(PLUGINS)}" for path in sources}
    assert BUILD.SOURCES.resolve() == PLUGINS
