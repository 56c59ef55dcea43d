"""Which other processes were at work meanwhile, by /proc of any Linux.

Reference: the kernel's Documentation/filesystems/proc.rst, table 1-4.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

_BUSY = 0.1  # of a core
_FEWEST_TICKS = 5  # fewer say little of a share
_MOST = 3
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of the kernel's include/linux/sched.h
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Other(BaseModel):
    """A process that is none of ours."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="its command, as the kernel calls it: 15 characters at most")
    pid: int = Field(description="its number")
    cores: float | None = Field(description="CPU time over time; None of one that has the GPU open")

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class _Process(NamedTuple):
    name: str
    parent: int
    ticks: int
    """CPU time since it began."""


class Processes(NamedTuple):
    """What each process had used at a moment."""

    at: float
    """In s, of a clock that has no other meaning."""
    found: Mapping[tuple[int, int], _Process]
    """By number and the time when it began: numbers are given again."""

    @classmethod
    def now(cls, root: Path) -> Processes:
        """All but threads of the kernel; takes some milliseconds. ``root`` is where /proc is."""
        found = {}
        for file in (root / "proc").glob("[0-9]*/stat"):
            try:
                text = file.read_text(encoding="utf-8", errors="replace")
            except OSError:  # it has ended since
                continue
            head, _, rest = text.rpartition(")")  # a name may have any character
            pid, _, name = head.partition(" (")
            fields = rest.split()  # from the third on
            if not int(fields[6]) & _KERNEL_THREAD:
                ticks = int(fields[11]) + int(fields[12])
                found[int(pid), int(fields[19])] = _Process(name, int(fields[1]), ticks)
        return cls(time.monotonic(), found)

    def since(self, before: Processes, on_gpu: Sequence[int] = ()) -> tuple[Other, ...]:
        """Three processes at most that are none of ours: those that have the GPU open, then the busiest that used more
        than a tenth of a core since; one that began and ended in between is not seen.

        Args:
            before: what there was then.
            on_gpu: numbers of the first.
        """
        known = {pid: process for (pid, _), process in self.found.items()}
        holding = [Other(name=known[pid].name if pid in known else "?", pid=pid, cores=None) for pid in on_gpu]
        busy = []
        for key, process in self.found.items():
            ticks = process.ticks - (before.found[key].ticks if key in before.found else 0)
            cores = ticks / _TICKS / (self.at - before.at)
            if ticks >= _FEWEST_TICKS and cores > _BUSY and key[0] not in on_gpu and not _ours(key[0], known):
                busy.append(Other(name=process.name, pid=key[0], cores=cores))
        busy.sort(key=lambda other: -(other.cores or 0))
        return (*holding, *busy)[:_MOST]


def in_words(turns: Sequence[Sequence[Other]]) -> str:
    """Those of some turns, three at most; empty where there were none."""
    found: dict[str, list[Other]] = {}
    for other in (other for turn in turns for other in turn):
        found.setdefault(str(other), []).append(other)
    often = sorted(found, key=lambda name: -sum(1 if other.cores is None else other.cores for other in found[name]))
    told = []
    for name in often[:_MOST]:
        shares = [other.cores for other in found[name] if other.cores is not None]
        what = f"up to {max(shares):.0%} of a core" if shares else "has the GPU open"
        told.append(f"{name[:-1]}, {what}, in {len(found[name])} of {len(turns)} turns)")
    if len(often) > _MOST:
        told.append(f"and {len(often) - _MOST} more")
    return ", ".join(told)


def _ours(pid: int, known: Mapping[int, _Process]) -> bool:
    """Whether it is this process or one that this began."""
    while pid != os.getpid():
        if pid not in known:
            return False
        pid = known[pid].parent
    return True
