"""`export` to a device as JetPack 5 is: TensorRT 8.5, and a Python that the package does not run on.

TensorRT's library, trtexec and CMake are stand-ins that write what those write, and down what they are asked for.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import onnx
import pytest

from acmix_deploy.artifacts import read_artifact
from acmix_deploy.cli import main
from acmix_deploy.errors import UserError
from acmix_deploy.manifest import HeaderManifest, manifest_of, read_manifest
from acmix_deploy.report.model import ExportReport
from tests.device.loopback import Device

torch = pytest.importorskip("torch")

EXPORT = ["export", "model.pt", "--fp16", "--input-shape", "1,3,32,48", "--seconds", "2", "--on", "bench"]
TIMES = (
    '[{"h2dMs": 0.5, "computeMs": 5, "d2hMs": 0.5, "latencyMs": 6},'
    ' {"h2dMs": 0, "computeMs": 7, "d2hMs": 0, "latencyMs": 7}]'
)
TRTEXEC = f"""#!/bin/sh
echo "$@" >>"$HOME/trtexec.log"
for word in "$@"; do
    file=${{word#*=}}
    case "$word" in
        --onnx=*|--loadEngine=*) [ -s "$file" ] || {{ echo "no $file"; exit 1; }} ;;
        --plugins=*) grep -q 'a plugin' "$file" || {{ echo "no $file"; exit 1; }} ;;
        --saveEngine=*) echo 'ftrt an engine' >"$file" ;;
        --exportTimes=*) echo '{TIMES}' >"$file" ;;
    esac
done
"""
CMAKE = """#!/bin/sh
echo "$@" >>"$HOME/cmake.log"
case "$1" in
    -S) [ -f "$2/CMakeLists.txt" ] && [ -d "$2/src" ] && mkdir -p "$4" ;;
    --build) echo 'a plugin' >"$2/libacmix_plugin.so" ;;
esac
"""


@pytest.fixture
def jetpack5(bench: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    from acmix_deploy.families.acmix.module import ACmix

    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler")
    (bench.root / "lib").mkdir(exist_ok=True)
    source = bench.root / "version.c"
    source.write_text("int getInferLibVersion(void) { return 8502; }\n")
    library = bench.root / "lib/libnvinfer.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    bench.set(LD_LIBRARY_PATH=bench.root / "lib")
    bench.old_python()
    bench.program("trtexec", TRTEXEC)
    bench.program("cmake", CMAKE)
    torch.manual_seed(0)
    stem = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
    torch.save(torch.nn.Sequential(stem, ACmix(16, 16, head=2)).eval(), tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    return bench


def asked(device: Device, program: str) -> list[str]:
    log = device.home / f"{program}.log"
    return log.read_text().splitlines() if log.exists() else []


def test_plugin_engine_and_times(jetpack5: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(EXPORT) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    report = ExportReport.model_validate_json(Path("model-deploy/report.json").read_text())
    assert report.device
    assert report.device.ran == ("cmake", "trtexec model.fp16.engine", "time model.fp16.engine")
    configured, compiled = asked(jetpack5, "cmake")
    assert configured.startswith("-S plugins -B build")
    assert compiled == "--build build --parallel 2"
    plugin = report.device.files["libacmix_plugin.so"]
    build, load = asked(jetpack5, "trtexec")
    # Types are no matter of the file in TensorRT 8.5, and so it is the fused one.
    assert build == f"--onnx=model.fused.onnx --fp16 --saveEngine=model.fp16.engine --plugins={plugin}"
    assert {f"--plugins={plugin}", "--duration=2", "--loadEngine=model.fp16.engine"} <= {*load.split()}
    assert onnx.load("model-deploy/model.onnx").opset_import[0].version == 17

    engine = report.files["fp16 engine"]
    assert engine.profile
    assert (engine.profile.median_ms, engine.profile.median_with_transfers_ms) == (6, 6.5)
    assert engine.size_bytes == len("ftrt an engine\n")
    assert report.uncompared == ("model.fp16.engine",)
    assert "every file but model.fp16.engine, not compared, computes" in told
    (command,) = report.next_steps
    kept = report.device.files["model.fp16.engine"]
    assert command == f"On bench: {jetpack5.bin}/trtexec --loadEngine={kept} --plugins={plugin}"

    # The second time nothing is compiled or built, and the engine comes with its manifest.
    assert main([*EXPORT, "--fetch"]) == 0
    assert len(asked(jetpack5, "cmake")) == 2
    assert [line for line in asked(jetpack5, "trtexec") if "--saveEngine" in line] == [build]
    manifest = manifest_of(read_artifact(Path("model-deploy/model.fp16.engine")).settings)
    assert isinstance(manifest, HeaderManifest)
    assert (manifest.origin, manifest.tensorrt) == ("trtexec", "TensorRT 8.5.2")
    with pytest.raises(UserError, match=r"was built by trtexec: it is of TensorRT 8\.5\.2"):
        read_manifest(Path("model-deploy/model.fp16.engine"))


def test_trtexec_is_told_sizes_as_the_file_has_them(jetpack5: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EXPORT, "--input", "uint8", "--dynamic", "batch"]) == 0, capsys.readouterr().err
    build, load = asked(jetpack5, "trtexec")
    sizes = [word.partition("=")[2] for word in build.split() if "Shapes=" in word]
    assert sizes == ["images:1x32x48x3", "images:1x32x48x3", "images:2x32x48x3"]
    assert "--shapes=images:1x32x48x3" in load.split()


def test_what_is_missing_is_told_before_the_export(jetpack5: Device, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--no-engine"], "Python 3.8"),
        ([], "bench has no trtexec"),
    ):
        jetpack5.without("trtexec")
        assert main([*EXPORT, *options]) == 3
        assert words in capsys.readouterr().err
    assert not Path("model-deploy").exists()


def test_a_build_that_fails_is_told_in_its_words(jetpack5: Device, capsys: pytest.CaptureFixture[str]) -> None:
    jetpack5.program("trtexec", "#!/bin/sh\necho 'out of tactics' >&2\nexit 1\n")
    assert main(EXPORT) == 3
    assert "what ran on bench ended with exit code 1: out of tactics" in capsys.readouterr().err
    assert "out of tactics" in Path("model-deploy/device.log").read_text()
    assert not Path("model-deploy/model.fp16.engine.json").exists()
