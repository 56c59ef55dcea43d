"""Model the time of the kernels on a device: what the slowest of its units needs for the counted instructions.

Every unit is taken to work without a pause, beside all others, at the clock and the rates of data sheets, so a kernel
takes longer than this. Nothing here was measured.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from scripts.instructions import Row, read_table

GUIDE = "CUDA C++ Best Practices Guide, throughput of native arithmetic instructions"


@dataclass(frozen=True)
class Rate:
    """Warp instructions that a multiprocessor takes in a clock, and where the number is from."""

    number: float
    source: str


RATES = {
    "total": Rate(4, "four schedulers, each an instruction a clock: H100 and Ampere white papers"),
    "fma": Rate(4, f"128 lanes on 8.7, 9.0 and later: {GUIDE}"),
    "imad": Rate(2, f"64 lanes: {GUIDE}"),
    "alu": Rate(2, f"64 lanes for logic, shifts and comparisons: {GUIDE}; taken for all of them"),
    "mufu": Rate(0.5, f"16 lanes: {GUIDE}"),
    "lsu": Rate(1, f"32 lanes for shuffles: {GUIDE}; taken for all of them"),
    "shared": Rate(1, "128 bytes: H100 and A100 white papers"),
}
"""By column of the table. That of tensor cores belongs to the device."""


@dataclass(frozen=True)
class Device:
    """What a device can do."""

    name: str
    architecture: str
    multiprocessors: int
    ghz: float
    gb_per_s: float
    tensor: int
    """Multiply-adds of halves that mma.sync does in a clock of a multiprocessor; 0 for not known."""
    source: str
    tensor_source: str


HOPPER = "half of what wgmma does by the H100 white paper; that mma.sync does no more is not verified"
ORIN = "half of the INT8 rate, which follows from the dense TOPS; that float sums take no longer is not verified"
DEVICES = (
    Device("H100 SXM", "sm_90", 132, 1.98, 3350, 1024, "H100 white paper and data sheet, highest clock", HOPPER),
    Device("H200", "sm_90", 132, 1.98, 4800, 1024, "H200 data sheet, clock and multiprocessors of the H100", HOPPER),
    Device("Orin Nano 8GB", "sm_87", 8, 0.625, 68, 1024, "Jetson Orin Nano data sheet", ORIN),
    Device("Orin Nano 8GB, super mode", "sm_87", 8, 1.02, 102, 1024, "NVIDIA's announcement of the super mode", ORIN),
    Device("Orin NX 16GB", "sm_87", 8, 0.918, 102.4, 1024, "Jetson Orin NX data sheet, deviceQuery", ORIN),
    Device("AGX Orin 64GB", "sm_87", 16, 1.3, 204.8, 1024, "Jetson AGX Orin technical brief", ORIN),
    Device(
        *("Thor T5000", "sm_110", 20, 1.575, 273, 1024),
        "Jetson T5000 data sheet, 20 multiprocessors by the driver; clock and bandwidth not verified",
        "that of sm_87; what mma.sync does beside tcgen05 is not documented, not verified",
    ),
)
BATCHES = (1, 32)
KERNEL = "local_attention_mma float16 NHWC"


def bounds(device: Device, row: Row, batch: int) -> dict[str, float]:
    """Microseconds that each unit needs. A grid that does not fill the device leaves multiprocessors idle."""
    blocks = row.blocks * batch
    most = math.ceil(blocks / device.multiprocessors) / blocks  # part of the work that one multiprocessor has
    clocks = {name: getattr(row, name) / rate.number for name, rate in RATES.items()}
    if device.tensor:
        clocks["tensor"] = row.tensor * 16 * 8 * 16 / device.tensor
    times = {name: count * row.queries / 16 * batch * most / device.ghz / 1e3 for name, count in clocks.items()}
    times["issue"] = times.pop("total")
    return times | {"memory": row.bytes * batch / device.gb_per_s / 1e3}


def largest(times: dict[str, float]) -> tuple[str, float]:
    """The unit that needs most time, and how much."""
    return max(times.items(), key=lambda item: item[1])


def rows_of(device: Device, kernel: str) -> list[Row]:
    """What was counted of a kernel for the device's architecture, by shape; nothing for an architecture not counted."""
    return [row for row in read_table()[1] if row.architecture == device.architecture and row.kernel == kernel]


def main() -> None:
    kernels = sorted({row.kernel for row in read_table()[1]})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", choices=kernels, default=KERNEL, help="default: %(default)s")
    kernel = parser.parse_args().kernel
    print(f"{kernel}: microseconds that each unit needs, and the largest. A model, not a measurement.")
    for device in DEVICES:
        print(f"\n{device.name}, {device.architecture}: {device.multiprocessors} multiprocessors at {device.ghz} GHz,")
        print(f"{device.gb_per_s} GB/s ({device.source});")
        print(f"{device.tensor} multiply-adds a clock and multiprocessor on tensor cores ({device.tensor_source})\n")
        head: list[str] = []
        for row in rows_of(device, kernel):
            for batch in BATCHES:
                times = bounds(device, row, batch)
                if not head:
                    head = list(times)
                    print(f"{'':24} batch " + " ".join(f"{name:>7}" for name in head))
                unit, time = largest(times)
                cells = " ".join(f"{each:7.1f}" for each in times.values())
                print(f"{row.shape:24} {batch:5} {cells}  {unit}, {times['memory'] / time:.0%} of the floor of bytes")
    print("\nWarp instructions a clock and multiprocessor:")
    for name, rate in RATES.items():
        print(f"{name:7} {rate.number:g}  {rate.source}")


if __name__ == "__main__":
    main()
