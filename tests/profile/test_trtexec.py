"""Times of trtexec are read as every TensorRT from 8.5 to 11 writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from acmix_deploy.errors import UserError
from acmix_deploy.profile.trtexec import read_times


def trtexec(inferences: list[dict[str, float]]) -> str:
    """The text of a file, in the spelling of trtexec: its own blanks, one inference a line, six digits."""
    keys = ("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs")
    keys += ("endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs")
    lines = [f'"{key}" : {{{key}:g}}' for key in keys]
    text, separator = "[\n", "  "
    for inference in inferences:
        text += separator + "{ "
        separator = ", "
        text += separator.join(lines).replace("{", "{0[").replace(":g}", "]:g}").format(inference) + " }\n"
    return text + "]\n"


def inference(h2d: float, compute: float, d2h: float, at: float = 5.0) -> dict[str, float]:
    enqueued = {"startEnqMs": at, "endEnqMs": at + 0.01}
    ends = {"startH2dMs": at, "endH2dMs": at + h2d, "startComputeMs": at + h2d, "endComputeMs": at + h2d + compute}
    ends |= {"startD2hMs": at + h2d + compute, "endD2hMs": at + h2d + compute + d2h}
    return {**enqueued, **ends, "h2dMs": h2d, "computeMs": compute, "d2hMs": d2h, "latencyMs": h2d + compute + d2h}


def test_compute_is_the_gpu_alone_and_latency_has_the_transfers(tmp_path: Path) -> None:
    compute = np.random.default_rng(0).uniform(1, 2, 200).round(4)
    file = tmp_path / "times.json"
    file.write_text(trtexec([inference(0.25, value, 0.125) for value in compute]))
    found = read_times(file)
    assert found.samples_ms == pytest.approx(compute)
    assert found.with_transfers_ms == pytest.approx(compute + 0.375)
    assert (found.median_ms, found.p95_ms) == pytest.approx((np.median(compute), np.percentile(compute, 95)))
    assert (found.file, found.provider, found.machine, found.rounds) == ("times.json", "trtexec", None, 1)
    assert (found.stable, found.precision, found.layers) == (None, None, ())
    assert "is not in the file" in found.notes[0]


def test_without_transfers_there_is_one_column(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(trtexec([inference(0, 1.5, 0)] * 3))
    found = read_times(tmp_path / "times.json")
    assert (found.samples_ms, found.with_transfers_ms, found.median_with_transfers_ms) == ((1.5,) * 3, None, None)


BAD = {
    "nothing": ("", "Invalid JSON"),
    "half": (trtexec([inference(1, 2, 3)])[:-40], "Invalid JSON"),
    "layers": ('[\n  { "count" : 10 }\n, { "name" : "conv", "timeMs" : 3.0 }\n]', "0.computeMs: Field required"),
    "sidecar": ('{"schema": 1, "path": "model.onnx"}', "valid array"),
    "empty": ("[]", "the list is empty"),
    "negative": (json.dumps([inference(1, 2, 3) | {"computeMs": -2.0}]), "0.computeMs: .* greater than or equal to 0"),
    "nan": (json.dumps([inference(1, 2, 3), inference(1, 2, 3) | {"computeMs": float("nan")}]), "1.computeMs"),
    "infinite": (json.dumps([inference(1, 2, 3) | {"computeMs": float("inf")}]), "0.computeMs"),
    "words": (json.dumps([inference(1, 2, 3) | {"latencyMs": "fast"}]), "0.latencyMs"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(UserError, match="holds no times") as raised:
        read_times(tmp_path / "times.json")
    assert re.search(words, raised.value.message)
    assert "\n" not in raised.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_times(tmp_path / "absent.json")
