"""Local attention on a GPU: the kernels beside FlexAttention, PyTorch's unfold and the time of moving the bytes once.

Everything is timed in one run, in two ways. Cold: each launch stands between two events, behind a write and then a read
of 16 times the L2 cache. Both keep the GPU busy while the launch is queued; the read displaces what was written, which
otherwise goes to memory while the launch is timed. Warm: a CUDA graph of many launches, replayed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from acmix_deploy.operators.axes import shapes
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from scripts.kernel_model import DEVICES, Device, bounds, largest, rows_of
from tests.gpu import device

SHAPES = ((64, 4),) if device.EMULATED else ((64, 80), (128, 40), (256, 20))
"""Channels and side of the map: what P3, P4 and P5 of a YOLOv8n see at 640 pixels."""
HEADS, KERNEL_SIZE, STRIDE = 4, 7, 1
OURS = "acmix"
WAYS = (
    ("float16", "NHWC", "mma"),
    ("float16", "NCHW", "mma"),
    ("float16", "NHWC", "simt"),
    ("float16", "NCHW", "simt"),
    ("float32", "NCHW", "simt"),
)
CLOCK_KHZ = 13
"""CUdevice_attribute: the highest clock of the multiprocessors."""
GRAPH_LAUNCHES = 1 if device.EMULATED else 20
SAMPLES = 1 if device.EMULATED else 100

cuda = device.cuda()
Call = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """All samples, in microseconds for one call. ``error`` says why there are none."""

    name: str
    channels: int
    side: int
    batch: int
    dtype: str
    floor_us: float
    cold_us: list[float]
    warm_us: list[float]
    starved: int = 0
    """Cold samples for which the GPU had to wait, so that they hold the latency of the launch."""
    error: str = ""


class Bench:
    """The clock: what it needs to displace the cache, and the bandwidth of a copy."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.properties = cuda.get_device_properties(0)
        size = 16 * self.properties.L2_cache_size
        self.written, self.read, source, copied = torch.rand(4, size // 4, device=device.DEVICE)
        copies, _ = self.cold(lambda: copied.copy_(source))
        self.bytes_per_us = 2 * size / float(np.median(copies))

    def cold(self, call: Call) -> tuple[list[float], int]:
        """Microseconds of each call, and how many of them the GPU waited for."""
        for _ in range(3):
            call()
        starved = 0
        events = []
        for _ in range(self.samples):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            self.written.zero_()
            self.read.sum()
            start.record()
            call()
            starved += start.query()
            end.record()
            events.append((start, end))
        cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events], starved

    def warm(self, call: Call) -> list[float]:
        """Microseconds of a call, the mean over each replay of the graph."""
        call()
        cuda.synchronize()
        replay = device.capture(lambda: [call() for _ in range(GRAPH_LAUNCHES)])
        replay()
        samples = []
        for _ in range(self.samples):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            samples.append(1e3 * start.elapsed_time(end) / GRAPH_LAUNCHES)
        return samples

    def measure(
        self, name: str, channels: int, side: int, batch: int, dtype: str, prepare: Callable[[], Call]
    ) -> Measurement:
        """Time what ``prepare`` returns. What cannot run here, a competitor of another PyTorch say, is a noted gap."""
        elements = batch * 4 * channels * side**2 + 2 * channels // HEADS
        floor = elements * getattr(torch, dtype).itemsize / self.bytes_per_us
        shape = (channels, side, batch, dtype, floor)
        try:
            call = prepare()
            warm = self.warm(call)
            cold, starved = self.cold(call)
            return Measurement(name, *shape, cold, warm, starved)
        except Exception as error:
            return Measurement(name, *shape, [], [], error=f"{type(error).__name__}: {error}".splitlines()[0])


def candidates(
    library: device.DeviceKernels, channels: int, side: int, batch: int, competitors: bool
) -> Iterator[tuple[str, str, Callable[[], Call]]]:
    """Name, dtype and preparation of all that compute on one shape."""
    for dtype, layout, kernel in WAYS:
        way = (dtype, layout, kernel)
        yield f"{OURS} {layout} {kernel}", dtype, partial(acmix, library, channels, side, batch, *way)
    if competitors:
        yield "FlexAttention, compiled", "float16", partial(flex, batch, channels // HEADS, side)
        yield "unfold, eager", "float16", partial(unfold, batch, channels // HEADS, side)


def acmix(
    library: device.DeviceKernels, channels: int, side: int, batch: int, dtype: str, layout: str, kernel: str
) -> Call:
    """One of the kernels, which has computed these inputs right."""
    head_dim = channels // HEADS
    attributes = {"num_heads": HEADS, "kernel_size": KERNEL_SIZE, "stride": STRIDE, "scale": head_dim**-0.5}
    sizes = {**attributes, "batch": batch, "head_dim": head_dim, "height": side, "width": side}
    problem = device.problem_for(LOCAL_ATTENTION, {"dtype": dtype, "layout": layout}, sizes)
    *inputs, y = (device.Placed.empty(shape, dtype, layout).tensor for shape in shapes(LOCAL_ATTENTION, sizes))
    for tensor in inputs:
        tensor.normal_()
    library.launch(LOCAL_ATTENTION, problem, inputs, y, kernel)
    expected = device.oracle(LOCAL_ATTENTION, inputs, attributes)
    error = float((y - expected).norm() / expected.norm())
    if not error <= device.limit(LOCAL_ATTENTION, dtype):
        raise ValueError(f"wrong result: relative L2 {error:.1e}")
    return lambda: library.launch(LOCAL_ATTENTION, problem, inputs, y, kernel)


def flex(batch: int, head_dim: int, side: int) -> Call:
    """FlexAttention over the window clipped at the border: neither reflection nor position."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = torch.randn(3, batch, HEADS, side**2, head_dim, dtype=torch.float16, device=device.DEVICE)

    def neighbours(b: Any, h: Any, query: Any, key: Any) -> Any:
        vertical = (query // side - key // side).abs() <= KERNEL_SIZE // 2
        return vertical & ((query % side - key % side).abs() <= KERNEL_SIZE // 2)

    torch._dynamo.reset()  # past a number of compilations of one function it would run uncompiled
    mask = create_block_mask(neighbours, None, None, side**2, side**2, device=device.DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def unfold(batch: int, head_dim: int, side: int) -> Call:
    """The attention as the paper's authors compute it, without the position term."""
    q, k, v = torch.randn(3, batch * HEADS, head_dim, side, side, dtype=torch.float16, device=device.DEVICE)

    def windows(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, [KERNEL_SIZE // 2] * 4, mode="reflect")
        return F.unfold(padded, KERNEL_SIZE).view(*x.shape[:2], KERNEL_SIZE**2, side, side)

    def call() -> torch.Tensor:
        weights = (q.unsqueeze(2) * head_dim**-0.5 * windows(k)).sum(1, keepdim=True).softmax(2)
        return (weights * windows(v)).sum(2)

    return call


def this_device(bench: Bench) -> Device:
    """The GPU as the model of the kernels' time wants it: at its highest clock, memory at the speed of a copy."""
    architecture = f"sm_{device.compute_capability()}"
    tensor = next((known.tensor for known in DEVICES if known.architecture == architecture), 0)
    multiprocessors, gb_per_s = bench.properties.multi_processor_count, bench.bytes_per_us / 1e3
    ghz = (device.attribute(CLOCK_KHZ) or 0) / 1e6
    return Device(bench.properties.name, architecture, multiprocessors, ghz, gb_per_s, tensor, "", "")


def model_us(gpu: Device, m: Measurement) -> tuple[str, float] | None:
    """The unit that bounds a kernel of ours by the model, and its time; None for what was not counted, or no clock."""
    if not m.name.startswith(OURS) or not gpu.ghz:
        return None
    _, layout, kernel = m.name.split()
    shape = f"{m.channels} ch, {m.side}x{m.side}, stride {STRIDE}"
    rows = [row for row in rows_of(gpu, f"local_attention_{kernel} {m.dtype} {layout}") if row.shape == shape]
    return largest(bounds(gpu, rows[0], m.batch)) if rows else None


def nvidia_smi(*fields: str) -> str:
    if device.EMULATED:
        return ", ".join("1 (emulated)" for _ in fields)
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def spread(samples: list[float]) -> str:
    """Median, in brackets the 10th and the 90th percentile."""
    low, median, high = np.percentile(samples, [10, 50, 90])
    return f"{median:.1f} [{low:.1f} to {high:.1f}]"


def markdown_row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def show(found: list[Measurement], gpu: Device) -> None:
    """One table a shape and batch."""
    first = found[0]
    flex_cold = next((np.median(m.cold_us) for m in found if m.name.startswith("Flex") and m.cold_us), None)
    print(f"\n{first.channels} ch, {first.side}x{first.side}, batch {first.batch}\n")
    print("| | dtype | cold us | of the floor | warm us | model us | FlexAttention / this, cold |")
    print("|---|---|---|---|---|---|---|")
    for m in found:
        if m.error:
            print(markdown_row([m.name, m.dtype, m.error, "", "", "", ""]))
            continue
        cold = float(np.median(m.cold_us))
        ratio = "" if flex_cold is None else f"{flex_cold / cold:.1f}"
        late = f", {m.starved} late" if m.starved else ""
        share = f"{m.floor_us:.1f} us, {m.floor_us / cold:.0%}"
        unit, time = model_us(gpu, m) or ("", 0.0)
        model = f"{time:.1f}, {unit}" if unit else ""
        cells = [m.name, m.dtype, spread(m.cold_us) + late, share, spread(m.warm_us), model, ratio]
        print(markdown_row(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of each measurement (default: {SAMPLES})")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes (default: 1 32)")
    parser.add_argument("--only", choices=[OURS], help="leave out what the kernels are compared with")
    parser.add_argument("--once", action="store_true", help="launch and time nothing but WAYS[0], for a profiler")
    parser.add_argument("--json", type=Path, help="write all samples to this file, after each shape")
    options = parser.parse_args()
    if device.missing():
        sys.exit(f"make bench-gpu: {device.missing()}")
    library = device.DeviceKernels(device.library())
    problems = [(channels, side, batch) for batch in options.batch for channels, side in SHAPES]
    if options.once:
        for problem in problems:
            acmix(library, *problem, *WAYS[0])
        return
    bench = Bench(options.samples)
    gpu = this_device(bench)
    machine = {
        "gpu, driver": nvidia_smi("name", "driver_version"),
        "torch": torch.__version__,
        "nvcc": json.loads(library.library.acmix_describe())["cuda"],
        "copy GB/s": round(bench.bytes_per_us / 1e3),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(sys.argv),
    }

    found: list[Measurement] = []
    for channels, side, batch in problems:
        print(f"measuring {channels} channels, {side}x{side}, batch {batch} ...", file=sys.stderr)
        rows = [
            bench.measure(name, channels, side, batch, dtype, prepare)
            for name, dtype, prepare in candidates(library, channels, side, batch, competitors=not options.only)
        ]
        found += rows
        if options.json:
            part = options.json.with_suffix(".part")
            part.write_text(json.dumps({"machine": machine, "found": [asdict(m) for m in found]}))
            part.replace(options.json)
        show(rows, gpu)

    nothing = torch.zeros(1, device=device.DEVICE)
    empty, _ = bench.cold(nothing.zero_)
    print(
        f"\nMedian [10th to 90th percentile] of {options.samples}; filling one element takes {spread(empty)} us, cold."
    )
    print("\n" + "; ".join(f"{name} {value}" for name, value in machine.items()))
    if wrong := [m for m in found if m.error and m.name.startswith(OURS)]:
        sys.exit(f"error: {len(wrong)} of the kernels' measurements failed, first {wrong[0].name}: {wrong[0].error}")


if __name__ == "__main__":
    main()
