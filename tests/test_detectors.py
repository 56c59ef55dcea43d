"""YOLOv8n with ACmix, from a checkpoint as Ultralytics saves it to files that ONNX Runtime runs at every size."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import onnx
import pytest

from acmix_deploy.pipeline import deploy
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.onnxruntime import open_session

pytest.importorskip("ultralytics", reason="ultralytics is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from demo import make_checkpoint


@pytest.mark.parametrize(
    ("variant", "blocks", "options"),
    [
        ("p3p4p5", 3, {"image_size": 160, "fp16": True}),
        ("p5", 1, {"image_size": 160, "opset": 17, "dynamic": ["batch", "height", "width"]}),
    ],
    ids=["static", "dynamic"],
)
def test_checkpoint_to_files(tmp_path, variant, blocks, options):
    make_checkpoint(tmp_path / "model.pt", variant)
    steps: list[str] = []
    report = deploy(tmp_path / "model.pt", tmp_path, expect=blocks, progress=steps.append, **options)
    assert report.passed
    assert [block.status for block in report.blocks] == ["canonical"] * blocks
    assert report.files["fused"].nodes < report.files["plain"].nodes
    assert len(steps) > 6
    distances = {c.candidate: c.relative_l2 for c in report.verification.comparisons}
    assert distances["model.fused.onnx"] < 1e-5
    if options.get("fp16"):
        assert distances["model.fp16.onnx"] > 1e-5, "an output that half precision does not change shows nothing"

    for name in ("model.onnx", "model.fused.onnx"):
        metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / name).metadata_props}
        assert ast.literal_eval(metadata["names"])[0]
        assert metadata["stride"] == "32"
        assert metadata["imgsz"] == "[640, 640]"
        assert "padding_value" in metadata["letterbox"]
    if "dynamic" in options:
        session = open_session(tmp_path / "model.fused.onnx")
        for batch, height, width in ((1, 128, 224), (3, 192, 160)):
            (output,) = session.run(None, {"images": random_images((batch, 3, height, width))})
            assert output.shape == (batch, 84, height * width * 21 // 1024)
