"""What other tools make of our files: the table in docs/targets.md, as far as they are installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import version_converter

from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.forms import to_form
from acmix_deploy.fusion import fuse
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from tests.families.parts import export
from tests.fusion.test_fuse import randomised

DOCS = Path(__file__).parents[1] / "docs/targets.md"
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Of each kind one of fixed sizes and one of free ones."""
    folder = tmp_path_factory.mktemp("tools")
    torch.manual_seed(0)
    block, x = randomised(ACmix(8, 16, head=2)), torch.randn(1, 8, 16, 24)
    found: dict[str, list[Path]] = {"plain": [], "fused": [], "form `plain`": []}
    for name, dynamic in (("fixed", ()), ("free", AXES)):
        plain, fused, form = (folder / f"{kind}-{name}.onnx" for kind in ("plain", "fused", "form"))
        fuse(export(block, x, plain, dynamic=dynamic), fused, expect=1)
        onnx.save(to_form(onnx.load(fused), "plain"), form)
        for files, file in zip(found.values(), (plain, fused, form), strict=True):
            files.append(file)
    return found


def converted(file: Path) -> onnx.ModelProto:
    model = version_converter.convert_version(onnx.load(file), 19)
    return model


def preprocessed(file: Path) -> onnx.ModelProto:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(file), target := str(file.with_name("preprocessed.onnx")))
    return onnx.load(target)


def slimmed(file: Path) -> onnx.ModelProto:
    return pytest.importorskip("onnxslim", reason="onnxslim is not installed").slim(str(file))


def simplified(file: Path) -> onnx.ModelProto:
    model, right = pytest.importorskip("onnxsim", reason="onnxsim is not installed").simplify(str(file))
    assert right
    return model


def by_openvino(file: Path) -> Callable[[Array], Array]:
    core = pytest.importorskip("openvino", reason="OpenVINO is not installed").Core()
    network = core.compile_model(core.read_model(str(file)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: np.asarray(network([x])[0])


TOOLS: dict[str, Callable[[Path], Any]] = {
    "onnx's version_converter": converted,
    "ONNX Runtime's quant_pre_process": preprocessed,
    "onnxslim": slimmed,
    "onnxsim": simplified,
    "OpenVINO": by_openvino,
}


def became(tool: Callable[[Path], Any], file: Path) -> str:
    """What a tool makes of a file, in a word or two."""
    before = onnx.load(file)
    free = "free" in file.name
    x = np.random.default_rng(0).standard_normal((2, 8, 24, 32) if free else (1, 8, 16, 24), np.float32)
    (name,) = (value.name for value in before.graph.input)
    try:
        made = tool(file)
    except Exception:  # each tool has errors of its own
        return "refused"
    if isinstance(made, onnx.ModelProto):
        if before.functions and not made.functions and any(node.domain == "acmix" for node in made.graph.node):
            return "definitions are lost"
        found = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {name: x})[0]
    else:
        found = made(x)
    distance = deviation(open_session(file).run(None, {name: x})[0], found).relative_l2
    assert distance is not None, file
    if distance > 1e-5:
        return "wrong"
    inlined = isinstance(made, onnx.ModelProto) and before.functions and not made.functions
    return "right, in standard operators" if inlined else "right"


@pytest.mark.parametrize("tool", TOOLS)
def test_the_table_of_tools_is_what_they_do(
    tool: str, files: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where ONNX Runtime leaves what it could not infer
    cells = []
    for both in files.values():
        fixed, free = (became(TOOLS[tool], file) for file in both)
        cells.append(fixed if fixed == free else f"{fixed}; free sizes: {free}")
    (row,) = re.findall(rf"^\| {re.escape(tool)} \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert row.split(" | ") == cells
