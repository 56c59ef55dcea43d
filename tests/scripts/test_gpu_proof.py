"""What tests and figures need on a machine with a GPU, and what its proof says: all of it on an emulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from acmix_deploy.operators import OPERATORS
from scripts import gpu_proof
from scripts.gpu_proof import Result, Step
from tests import ROOT
from tests.plugin import kernels

INSTALLED = ("torch", "numpy", "pytest", "onnx", "onnxruntime")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python that has the packages of INSTALLED, what they need, and no others."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    wanted, seen = list(INSTALLED), set()
    while wanted:
        if (name := wanted.pop()) in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        for file in {Path(file.parts[0]) for file in distribution.files or () if file.parts[0] != ".."}:
            if not (packages / file).exists():
                (packages / file).symlink_to(distribution.locate_file(file))
        needs = map(Requirement, distribution.requires or ())
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return python


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without CUDA_VISIBLE_DEVICES there may be a GPU.
    env = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=300)


def test_targets_start_with_few_packages(bare_python):
    assert run(bare_python, "-c", "import pydantic").returncode == 1
    python = ("VENV=none", f"PYTHON={bare_python}")
    tests = run("make", "test-gpu", *python)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "no NVIDIA GPU" in tests.stdout
    assert "could not import 'tests.gpu.engines': No module named" in tests.stdout
    figures = run("make", "bench-gpu", *python)
    assert figures.stderr.startswith("make bench-gpu: no NVIDIA GPU\n")


@pytest.mark.soak
@pytest.mark.skipif(bool(kernels.missing_compiler()), reason=kernels.missing_compiler())
def test_proof_on_an_emulated_device(bare_python, tmp_path):
    kernels.library()
    done = run("scripts/gpu_proof.sh", tmp_path / "out", PYTHON=str(bare_python), ACMIX_GPU_DEVICE="emulated")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {step["name"]: step for step in json.loads((tmp_path / "out/steps.json").read_text())}
    assert {name: step["verdict"] for name, step in steps.items()} == {
        **dict.fromkeys(("build", "rows", "speed", "others"), "passed"),
        **dict.fromkeys(("ncu", "sanitizer"), "skipped"),
    }
    assert "no driver that compiles PTX" in steps["others"]["words"]
    summary = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert done.stdout.splitlines()[-len(summary) :] == summary
    assert len(summary) < gpu_proof.LINES
    ways = sum(len(kernel.formats) for operator in OPERATORS for kernel in operator.kernels)
    assert sum("launches, 0 wrong, largest error" in line for line in summary) == ways
    assert sum("us cold, warm" in line for line in summary) == 2


def test_no_gpu(tmp_path):
    done = run(sys.executable, "-m", "scripts.gpu_proof", tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: no NVIDIA GPU\n")


def test_what_fails_stops_nothing(monkeypatch, tmp_path, capsys):
    """Time that a step leaves goes to the next ones."""
    steps = [
        Step("crash", 1, ["sh", "-c", "echo reason; exit 3"]),
        Step("hang", 0, ["sleep", "60"]),
        Step("absent", 1, ["true"], missing="no such tool"),
        Step("last", 1, ["echo", "=== 2 passed, 1 skipped in 0.01s ==="]),
    ]
    monkeypatch.setattr(gpu_proof, "steps", lambda out: steps)
    monkeypatch.setattr(gpu_proof.device, "missing", lambda: "")
    monkeypatch.setattr(sys, "argv", ["gpu_proof", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu_proof.main()
    assert end.value.code == 1
    found = [Result(**step) for step in json.loads((tmp_path / "steps.json").read_text())]
    assert [(result.verdict, result.words) for result in found] == [
        ("FAILED", "exit code 3; reason"),
        ("STOPPED", "exit code 124; == hang, at most 1 s: sleep 60"),
        ("skipped", "no such tool"),
        ("passed", "2 passed, 1 skipped"),
    ]
    assert capsys.readouterr().out.splitlines()[-4:] == gpu_proof.summary(found, tmp_path)


def test_wrong_rows_show(tmp_path):
    row = {"operator": "Op", "kernel": "mma", "dtype": "float16", "layout": "NHWC", "head_dim": 8, "limit": 2e-3}
    row |= {"kernel_size": 7, "stride": 1, "height": 9, "width": 17}
    lines = [json.dumps({**row, "error": error}) for error in (1e-4, float("nan"), 0.1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert gpu_proof.errors(tmp_path / "rows.jsonl") == [
        "Op mma float16 NHWC: 3 launches, 2 wrong, largest error nan of 2.0e-03 at head_dim 8 K 7 s 1 9x17"
    ]


def test_counters_of_nsight_compute(tmp_path):
    report = """\
==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","launch__grid_size","other"
"","","us","register/thread","",""
"0","local_attention_mma_kernel","24.1","96","12,800","1"
"1","local_attention_mma_kernel","12.0","128","3,200","1"
"""
    (tmp_path / "ncu.csv").write_text(report)
    assert gpu_proof.counters(tmp_path / "ncu.csv") == [
        "gpu__time_duration.sum 24.1, 12.0 us",
        "launch__registers_per_thread 96, 128 register/thread; launch__grid_size 12,800, 3,200 ",
    ]
