"""What docs/int8.md says that INT8 costs the trained detector."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ultralytics", reason="ultralytics is not installed")
pytest.importorskip("cv2", reason="OpenCV is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")


@pytest.mark.soak
def test_what_int8_costs(tmp_path: Path) -> None:
    """On 500 held-back images half a point of mAP50-95, and one with the head, whatever was calibrated on."""
    from scripts.int8_accuracy import CALIBRATION, Bench

    bench = Bench(tmp_path)
    for seed in CALIBRATION:
        assert bench.row("default", seed).drop <= 0.5
        assert bench.row("with the head", seed, quantize_head=True).drop <= 1.0


@pytest.mark.soak
def test_a_target(tmp_path: Path) -> None:
    """A search among all layers ends below its target; on other images nothing is lost that was not before."""
    from scripts.int8_accuracy import Bench

    row = Bench(tmp_path).row("search", goal=0.1, quantize_head=True)
    assert row.report.search
    assert row.report.search.met
    assert len(row.report.search.excluded) < 20
    assert row.drop <= 1.0
