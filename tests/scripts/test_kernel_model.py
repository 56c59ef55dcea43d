"""The model of the kernels' time, by numbers that can be followed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.instructions import Row
from scripts.kernel_model import DEVICES, KERNEL, Device, bounds, largest, main, rows_of

DEVICE = Device("device", "sm_90", multiprocessors=10, ghz=1.0, gb_per_s=100, tensor=1024, source="", tensor_source="")
ROW = Row(
    *("sm_90", "kernel", "shape"),
    *{"queries": 16_000, "bytes": 1_000_000, "blocks": 100, "warps": 1.0}.values(),
    *{"prologue": 100.0, "loads": 100.0, "rows": 200.0, "epilogue": 0.0, "total": 400.0}.values(),
    *{"fma": 200.0, "imad": 20.0, "alu": 100.0, "tensor": 50.0, "mufu": 30.0, "lsu": 60.0, "shared": 150.0}.values(),
)


def test_each_unit_has_its_rate():
    """1,000 times what is counted for 16 queries, on ten multiprocessors with 1,000 clocks a microsecond."""
    times = {"issue": 10, "fma": 5, "imad": 1, "alu": 5, "tensor": 10, "mufu": 6, "lsu": 6, "shared": 15, "memory": 10}
    assert bounds(DEVICE, ROW, batch=1) == pytest.approx(times)
    assert largest(bounds(DEVICE, ROW, batch=1)) == ("shared", pytest.approx(15))
    assert bounds(DEVICE, ROW, batch=3)["issue"] == pytest.approx(30)


def test_tensor_cores_of_no_known_rate_bound_nothing():
    assert "tensor" not in bounds(replace(DEVICE, tensor=0), ROW, batch=1)


def test_what_the_page_says_of_memory():
    """It is the slowest at batch 32, or within a tenth of it, but on the H200."""
    for device in DEVICES:
        times = [bounds(device, row, batch=32) for row in rows_of(device, KERNEL)]
        assert times
        assert all(each["memory"] > 0.9 * max(each.values()) for each in times) == (device.name != "H200")


def test_multiprocessors_idle_where_the_grid_is_small():
    assert bounds(DEVICE, replace(ROW, blocks=5), batch=1)["issue"] == pytest.approx(20)
    assert bounds(DEVICE, replace(ROW, blocks=11), batch=1)["issue"] == pytest.approx(10 * 20 / 11)
    assert bounds(DEVICE, replace(ROW, blocks=5), batch=1)["memory"] == pytest.approx(10)


def test_every_device_is_modelled(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernel_model"])
    main()
    text = capsys.readouterr().out
    for device in DEVICES:
        assert rows_of(device, "local_attention_mma float16 NHWC")
        assert f"{device.name}, {device.architecture}" in text
        assert device.source in text
