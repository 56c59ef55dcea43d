"""The package as it is given away: built, checked, and used in an environment that has nothing else and no checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import onnx.parser
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from acmix_deploy import __version__
from acmix_deploy.families.acmix.module import ACmix
from scripts.base_install import size
from tests.families.parts import export
from tests.fusion.test_fuse import randomised

CHECKOUT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
EXTRAS = {
    "detect model.onnx photos": "images",
    "export model.pt": "export",
    "report found": "report",
    "serve model.onnx": "serve",
}


def outside():
    """The environment without what names the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def run(*command, code=0, folder, **environment):
    """Run a program outside of the checkout, which nothing of the environment names; what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=folder,
        env=outside() | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that ``make dist`` fills, of a copy of the checkout."""
    pytest.importorskip("build", reason="build is not installed: pip install -e '.[dev]'")
    copy = tmp_path_factory.mktemp("dist") / "copy"
    left_out = shutil.ignore_patterns(".*", "docs", "build", "dist", "out", "*.egg-info", "__pycache__")
    shutil.copytree(CHECKOUT, copy, symlinks=True, ignore=left_out)
    # Beside the isolated environment, for which pip downloads setuptools, this is what make dist runs.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", copy.parent, copy, folder=copy)
    return copy.parent


@pytest.fixture(scope="module")
def wheel(dist):
    return next(dist.glob("*.whl"))


def base_install():
    """The distributions that the package needs without an extra."""
    found, rest = {}, list(metadata.requires("acmix-deploy") or ())
    while rest:
        requirement = Requirement(rest.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found[name] = metadata.distribution(name)
            rest += found[name].requires or ()
    return found.values()


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel, and links to the packages that pip would install beside it."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    for distribution in base_install():
        for name in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / name).exists():
                (packages / name).symlink_to(Path(str(distribution.locate_file(name))))
    return folder


@pytest.fixture
def program(environment):
    return environment / "bin/acmix-deploy"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return export(randomised(ACmix(3, 8, head=2)), torch.randn(1, 3, 10, 12), tmp_path_factory.mktemp("m") / "m.onnx")


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector of one convolution."""
    path = tmp_path_factory.mktemp("detector") / "model.onnx"
    onnx.save(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17], metadata_props: [
            "task": "detect", "names": "{0: 'cross', 1: 'ring'}", "stride": "32", "imgsz": "[32, 32]", "batch": "1"]>
            main (float[1, 3, 32, 32] images) => (float[1, 6, 1] output0)
            <int64[4] kernel = {6, 3, 32, 32}, int64[3] shape = {1, 6, 1}>
            { w = ConstantOfShape(kernel) y = Conv(images, w) output0 = Reshape(y, shape) }"""
        ),
        path,
    )
    return path


def test_what_is_inside(wheel):
    """All modules, and every file that the package reads beside them."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        described = archive.read(f"acmix_deploy-{__version__}.dist-info/METADATA").decode()
    modules = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "acmix_deploy").rglob("*.py")}
    native = {
        f"acmix_deploy/plugin/native/{path.relative_to(CHECKOUT / 'plugins').as_posix()}"
        for pattern in ("CMakeLists.txt", "exports.map", "include/**/*.*", "src/*.*", "tensorrt/*.*")
        for path in (CHECKOUT / "plugins").glob(pattern)
    }
    library = {
        f"acmix_deploy/serving/deepstream/library/{name}" for name in ("parser.cpp", "Makefile", "CMakeLists.txt")
    }
    beside = {
        "acmix_deploy/py.typed",
        "acmix_deploy/serving/page.html",
        "acmix_deploy/report/templates/report.html",
        "acmix_deploy/device/jetson/install.sh",
        f"acmix_deploy-{__version__}.dist-info/licenses/LICENSE",
    }
    told = {
        f"acmix_deploy-{__version__}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")
    }
    told.add(f"acmix_deploy-{__version__}.dist-info/top_level.txt")
    assert len(native) > 20
    assert names == modules | native | library | beside | told
    assert "Classifier: Typing :: Typed" in described
    assert "License-Expression: Apache-2.0" in described


def test_the_source_distribution(dist):
    """What the wheel is built from, and nothing under another licence, as the trained detector of the tests is."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "pyproject.toml", "acmix_deploy/plugin/native/CMakeLists.txt"} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith((".pt", ".onnx", ".pyc"))]


def test_twine(dist):
    pytest.importorskip("twine", reason="twine is not installed: pip install -e '.[dev]'")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *dist.glob("acmix_deploy-*.*"), folder=dist).stdout
    assert said.count("PASSED") == 2


def test_version(environment, program, tmp_path):
    """One version, of the package that is installed."""
    assert run(program, "--version", folder=tmp_path).stdout == f"acmix-deploy {__version__}\n"
    code = (
        "import acmix_deploy; from importlib import metadata; "
        "print(acmix_deploy.__file__, metadata.version('acmix-deploy'))"
    )
    where, version = run(environment / "bin/python", "-c", code, folder=tmp_path).stdout.split()
    assert Path(where).is_relative_to(environment)
    assert version == __version__
    assert f'"{__version__}"' not in (CHECKOUT / "pyproject.toml").read_text()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux tells no time that a process waited")
def test_help_is_quick(program, tmp_path):
    assert quickest(program, "--help", folder=tmp_path) < 0.3


def test_help_imports_nothing_heavy(environment, tmp_path):
    """What takes long to import is left for the verbs that need it."""
    code = (
        "import sys\ntry:\n    from acmix_deploy.cli import main; main(['--help'])\n"
        "finally:\n    print(sorted({'numpy', 'onnx', 'onnxruntime', 'rich', 'polygraphy'} & set(sys.modules)))"
    )
    said = run(environment / "bin/python", "-c", code, folder=tmp_path).stdout
    assert said.endswith("[]\n")
    assert "export" in said


def test_doctor(program, tmp_path):
    found = json.loads(run(program, "doctor", "--json", folder=tmp_path).stdout)
    states = {each["name"]: each["state"] for each in found["environment"]}
    assert states["acmix-deploy"] == states["ONNX Runtime"] == "ok"
    assert states["PyTorch"] == "missing"


def test_readme_with_only_an_onnx_file(program, plain, tmp_path):
    """Its lines as they stand, measured for a moment; quantize reads images, and says what it lacks for them."""
    section = (CHECKOUT / "README.md").read_text().partition("## I have only an ONNX file")[2].partition("\n## ")[0]
    lines = re.findall(r"^\$ acmix-deploy ((?:fuse|quantize|verify|profile|gate run) .*)$", section, re.M)
    verbs = [line.split()[0] for line in lines]
    assert verbs[0] == "fuse"
    assert {"verify", "profile", "gate"} <= set(verbs)
    for name in ("model.onnx", "new.fused.onnx"):
        shutil.copy(plain, tmp_path / name)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_bytes(b"\xff\xd8\xff")
    quick = {"profile": ["--samples", "3"], "gate": ["--rounds", "1", "--samples", "3"]}
    for verb, line in zip(verbs, lines, strict=True):
        words = [word for word in shlex.split(line) if verb == "quantize" or word != "model.int8.onnx"]
        done = run(program, *words, *quick.get(verb, []), code=3 if verb == "quantize" else 0, folder=tmp_path)
        assert verb != "quantize" or "pip install 'acmix-deploy[images]'" in done.stderr
    run(program, "fuse", "model.onnx", "-o", "two.onnx", "--expect", "2", code=1, folder=tmp_path)


@pytest.mark.parametrize("command", EXTRAS)
def test_which_extra_is_missing(command, program, detector, tmp_path):
    shutil.copy(detector, tmp_path)
    (tmp_path / "model.pt").write_bytes(b"PK")
    for name in ("photos", "found"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos/1.jpg").write_bytes(b"\xff\xd8\xff")
    said = run(program, *command.split(), code=3, folder=tmp_path).stderr
    assert f"pip install 'acmix-deploy[{EXTRAS[command]}]'" in said
    assert EXTRAS[command] in metadata.metadata("acmix-deploy").get_all("Provides-Extra", [])


def interpreter(version):
    """Python of a version, from the path or pyenv; None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in (shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python{version}")):
        if python and subprocess.run([python, "--version"], check=False, capture_output=True).returncode == 0:
            return python
    return None


@pytest.mark.soak
@pytest.mark.parametrize("version", PYTHONS)
def test_base_install(version, wheel, plain, tmp_path):
    """What pip makes of the wheel alone: it works, is not large, and starts fast. Needs an index."""
    python = interpreter(version)
    if python is None:
        resolve = ["install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version", version]
        where = ["--target", tmp_path / "none", "--report", tmp_path / "report.json"]
        run(sys.executable, "-m", "pip", *resolve, *where, wheel, folder=tmp_path)
        found = {each["metadata"]["name"] for each in json.loads((tmp_path / "report.json").read_text())["install"]}
        assert {"acmix-deploy", "numpy", "onnx", "onnxruntime", "pydantic_core"} <= found
        print(f"Python {version} is not here; {len(found)} packages would be installed")
        return
    run(python, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    program = tmp_path / "venv/bin/acmix-deploy"
    packages = next(tmp_path.glob("venv/lib/python*/site-packages"))
    before = size(packages)
    run(tmp_path / "venv/bin/pip", "install", wheel, folder=tmp_path)
    megabytes = (size(packages) - before) / 1e6
    run(tmp_path / "venv/bin/pip", "check", folder=tmp_path)
    shutil.copy(plain, tmp_path / "model.onnx")
    run(program, "fuse", "model.onnx", "-o", "fused.onnx", "--expect", "1", folder=tmp_path)
    run(program, "verify", "model.onnx", "fused.onnx", "--random", "2", folder=tmp_path)
    run(program, "doctor", folder=tmp_path)
    said = run(tmp_path / "venv/bin/pip", "install", "--dry-run", "acmix-deploy[report]", folder=tmp_path).stdout
    assert "matplotlib" in said.partition("Would install")[2], "what hints say works though no index has the package"
    seconds = quickest(program, "--help", folder=tmp_path)
    print(f"Python {version}: {megabytes:.0f} MB, --help in {seconds:.3f} s")
    assert megabytes < 400
    assert seconds < 0.3


def quickest(*command, folder):
    """Seconds of the clock that a command takes at its best, without those in which others had the core."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, env=outside(), stdout=subprocess.DEVNULL) as process:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - start
            waited = Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]  # ns, of a process that has ended
        assert process.returncode == 0
        best = min(best, seconds - int(waited) / 1e9)
    return best
