"""Right, fast and safe on this GPU? All that a first run on one has to tell, in 450 seconds.

Every step has its time; what one leaves of it the next ones have, and what fails stops no other. OUT gets log.txt with
all output, rows.jsonl and speed.json, which grow with every launch and shape, steps.json and the report of Nsight
Compute. The last lines printed, at most 40, are the whole result; they are in summary.txt too.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.gpu import device

LINES = 40
METRICS = (
    r"gpu__time_duration\.sum",
    r"launch__(registers_per_thread|shared_mem_per_block_dynamic|grid_size)",
    r"(sm__throughput|sm__warps_active|smsp__issue_active)\.avg\.pct\w*",
    r"(l1tex__throughput|lts__throughput|gpu__dram_throughput)\.avg\.pct\w*",
    r"(dram__bytes_read|dram__bytes_write|l1tex__data_bank_conflicts_pipe_lsu_mem_shared)\.sum",
    r"sm__inst_executed_pipe_(xu|fma|alu|lsu|tensor\w*)\.avg\.pct_of_peak_sustained_active",
    r"smsp__average_warps_issue_stalled_(\w+_scoreboard|barrier|\w+_throttle|wait)_per_issue_active\.ratio",
)
"""Of those that Nsight Compute collects, the ones to print: a line for each pattern."""

WINDOW = {"kernel_size": "K", "stride": "s", "dilation": "D", "border": "border"}
"""What an operator may have of a window, and how it is printed."""


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int
    command: Sequence[str | Path]
    missing: str = ""
    """What it needs and is not here."""


@dataclass(frozen=True)
class Result:
    name: str
    verdict: str
    seconds: float
    words: str

    def __str__(self) -> str:
        return f"{self.name:10}{self.verdict:8}{self.seconds:6.1f} s  {self.words[:300]}"


def steps(out: Path) -> list[Step]:
    def tests(*names: str) -> list[str | Path]:
        options = ["-p", "no:cacheprovider", "-k", " or ".join(names)]
        return [sys.executable, "-m", "pytest", *options, "tests/gpu/test_kernels_gpu.py"]

    def bench(*options: str | Path) -> list[str | Path]:
        return [sys.executable, "-m", "scripts.bench_gpu", *options]

    ncu = None if device.EMULATED else device.cuda_tool("ncu")
    launches = ["--clock-control", "none", "--kernel-name", "regex:local_attention", "--launch-count", "2"]
    report = ["--set", "full", "--page", "raw", "--csv", "--log-file", out / "ncu.csv", "--export", out / "ncu.ncu-rep"]
    profile = [str(ncu), *launches, *report, *bench("--once", "--batch", "32")]
    no_gpu = "no GPU: the device is emulated" if device.EMULATED else ""
    batches = ("2", "1") if device.EMULATED else ("32", "1")
    return [
        Step("build", 90, [sys.executable, "-m", "tests.gpu.device"]),
        Step("rows", 40, tests("every_window", "without_position", "any_address", "graph_capture")),
        Step("speed", 140, bench("--only", "acmix", "--batch", *batches, "--json", out / "speed.json")),
        Step("ncu", 50, profile, no_gpu or ("" if ncu else "no ncu on the PATH or beside nvcc")),
        Step("sanitizer", 80, tests("sanitizer")),
        Step("others", 50, tests("sm_75", "detector", "streams")),
    ]


def run(step: Step, limit: float, out: Path) -> Result:
    """Run a step to its end, or to that of its time."""
    if step.missing:
        return Result(step.name, "skipped", 0, step.missing)
    begin = time.monotonic()
    log = out / "log.txt"
    start = log.stat().st_size if log.exists() else 0
    environment = {**os.environ, "ACMIX_GPU_ROWS": str(out / "rows.jsonl"), "COLUMNS": "300"}
    with log.open("a") as file:
        print(f"\n== {step.name}, at most {limit:.0f} s: {' '.join(map(str, step.command))}", file=file, flush=True)
        command = ["timeout", "--kill-after=5", f"{max(limit, 1):.0f}", *step.command]  # 0 would be no limit
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    text = log.read_bytes()[start:].decode(errors="replace")
    counts = re.findall(r"^=+ (\d+ \w+.*) in [\d.]+s.*=$", text, re.M)[-1:]
    failed = re.findall(r"^(?:FAILED|ERROR) .*", text, re.M)
    if code == 0:
        verdict = "skipped" if counts and "passed" not in counts[0] else "passed"
        words = [*counts, *dict.fromkeys(re.findall(r"^SKIPPED .*?: (.*)", text, re.M))]
    else:
        verdict = "STOPPED" if code in (124, 137) else "FAILED"
        words = [f"exit code {code}", *counts, *(failed[:1] or text.strip().splitlines()[-1:])]
    return Result(step.name, verdict, round(time.monotonic() - begin, 1), "; ".join(words))


def summary(results: Iterable[Result], out: Path) -> list[str]:
    """What was found, a line each."""
    found = [*errors(out / "rows.jsonl"), *speeds(out / "speed.json"), *counters(out / "ncu.csv")]
    return [*map(str, results), *found][:LINES]


def errors(path: Path) -> list[str]:
    """The largest error of each kernel, beside its limit."""
    rows: dict[str, list[dict[str, Any]]] = {}
    text = path.read_text().splitlines() if path.exists() else []
    for row in (json.loads(line) for line in text if line.endswith("}")):  # the last may be cut
        rows.setdefault("{operator} {kernel} {dtype} {layout}".format(**row), []).append(row)
    lines = []
    for name, found in rows.items():
        # NaN, which no comparison holds for, is worse than any number.
        worst = max(found, key=lambda row: row["error"] if row["error"] == row["error"] else float("inf"))
        wrong = sum(not row["error"] <= row["limit"] for row in found)
        window = " ".join(f"{letter} {worst[size]}" for size, letter in WINDOW.items() if size in worst)
        sizes = f"head_dim {worst['head_dim']} {window} {worst['height']}x{worst['width']}"
        figures = f"largest error {worst['error']:.1e} of {worst['limit']:.1e} at {sizes}"
        lines.append(f"{name}: {len(found)} launches, {wrong} wrong, {figures}")
    return lines


def speeds(path: Path) -> list[str]:
    """Medians of each shape."""
    if not path.exists():
        return []
    document = json.loads(path.read_text())
    shapes: dict[str, list[dict[str, Any]]] = {}
    for row in document["found"]:
        shapes.setdefault("{channels} ch, {side}x{side}, batch {batch}".format(**row), []).append(row)
    lines = ["; ".join(f"{name} {value}" for name, value in document["machine"].items() if name != "command")]
    for shape, rows in shapes.items():
        cells = [
            f"{row['name'].removeprefix('acmix ')} {row['dtype']} "
            + (row["error"] or f"{median(row['cold_us']):.1f}, {median(row['warm_us']):.1f}")
            for row in rows
        ]
        floor = f"floor in {rows[0]['dtype']} {rows[0]['floor_us']:.1f}"
        lines.append(f"{shape}, us cold, warm, {floor}: {'; '.join(cells)}")
    return lines


def counters(path: Path) -> list[str]:
    """What Nsight Compute counted, a value a launch."""
    text = path.read_text().splitlines() if path.exists() else []
    names, units, *launches = list(csv.reader(line for line in text if line.startswith('"'))) or [[], []]
    columns = list(zip(names, units, *(launch for launch in launches if len(launch) == len(names)), strict=True))
    lines = []
    for pattern in METRICS:
        cells = [f"{name} {', '.join(values)} {unit}" for name, unit, *values in columns if re.fullmatch(pattern, name)]
        lines += ["; ".join(cells)] if cells else []
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for what is found")
    out = parser.parse_args().out.resolve()
    if device.missing():
        sys.exit(f"error: {device.missing()}")
    results: list[Result] = []
    end = time.monotonic()
    for step in steps(out):
        end += step.seconds
        results.append(run(step, end - time.monotonic(), out))
        print(results[-1], flush=True)
        (out / "steps.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    text = "\n".join(summary(results, out))
    (out / "summary.txt").write_text(f"{text}\n")
    print(text)
    sys.exit(any(result.verdict in ("FAILED", "STOPPED") for result in results))


if __name__ == "__main__":
    main()
