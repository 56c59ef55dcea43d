"""What a machine says of its clocks, temperature, power and load: /proc and sysfs of any Linux, NVML for a GPU.

References: NVIDIA's NVML API Reference Guide, "Device Queries"; Jetson Linux Developer Guide, "Platform Power and
Performance"; the kernel's Documentation/hwmon/ina3221.rst and admin-guide/pm/cpufreq.rst.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy import driver
from acmix_deploy.errors import MissingComponent
from acmix_deploy.process import run
from acmix_deploy.profile.others import Other, Processes

INTERVAL = 0.05
"""Seconds between two readings of :meth:`Monitor.watching`."""

# nvmlClocksEventReason*: what holds clocks down against the will of whoever set them.
_NVML_REASONS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature, by the driver",
    0x40: "temperature, by the hardware",
    0x80: "power brake",
}
_INPUT_RAILS = ("VDD_IN", "VIN")  # these feed all others
_JETSON_GPU = re.compile(r"\.(gpu|g[apv]\d+b)$|^gpu-gpc-\d+$")


class Conditions(BaseModel):
    """The state of a machine at one moment; None for what it does not tell."""

    model_config = ConfigDict(frozen=True)

    cpu_mhz: float | None = Field(default=None, description="mean clock of all CPU cores in MHz")
    load: float | None = Field(default=None, description="load average of the last minute")
    gpu_mhz: float | None = Field(default=None, description="clock of the GPU in MHz")
    memory_mhz: float | None = Field(default=None, description="clock of its memory in MHz")
    temperature_c: float | None = Field(default=None, description="temperature of the GPU in degrees Celsius")
    power_w: float | None = Field(default=None, description="power in W: of the board of a GPU, of a Jetson's module")
    rails_w: dict[str, float] = Field(default={}, description="power of each rail of a Jetson in W")
    throttling: tuple[str, ...] | None = Field(default=None, description="what holds the clocks down, empty if nothing")
    power_mode: str | None = Field(default=None, description="mode of nvpmodel, or the limit of the board's power")
    others: tuple[Other, ...] = Field(
        default=(), description="other processes that were at work since the turn began, three at most"
    )

    @property
    def known(self) -> bool:
        """Whether anything at all was told."""
        return self != Conditions()


class Power(BaseModel):
    """Power under a steady load, read every ``interval_s`` from a second after the load began."""

    model_config = ConfigDict(frozen=True)

    readings: tuple[Conditions, ...] = Field(description="every reading, over all rounds")
    interval_s: float = Field(description="time between two readings in s")
    mean_w: float = Field(description="mean power in W")
    inference_ms: float = Field(description="time of one inference under this load in ms, waiting included")
    images: int = Field(description="images in a batch")
    energy_mj: float = Field(description="energy of one inference, of the whole batch, in mJ: mean_w * inference_ms")

    @classmethod
    def of(cls, readings: list[Conditions], inference_ms: float, images: int) -> Power:
        """The sum of readings of which at least one tells power."""
        mean_w = fmean(reading.power_w for reading in readings if reading.power_w is not None)
        return cls(
            readings=tuple(readings),
            interval_s=INTERVAL,
            mean_w=mean_w,
            inference_ms=inference_ms,
            images=images,
            energy_mj=mean_w * inference_ms,
        )


class Monitor:
    """Reads :class:`Conditions`.

    Args:
        root: where /sys and /proc are; another folder in tests.
        nvml: ask NVML too: what it knows is of the first GPU, and says nothing of work on the CPU.
    """

    def __init__(self, root: Path = Path("/"), *, nvml: bool = True) -> None:
        self._nvml, self._nvml_problem = _nvml() if nvml else (None, "NVML knows the power of a GPU, not of the CPU")
        self._cpu, self._jetson = _Cpu(root), _Jetson(root)
        self._power_mode = _power_mode()
        self._root = root

    def processes(self) -> Processes:
        """What each process has used until now, for :meth:`read_since`."""
        return Processes.now(self._root)

    def read_since(self, before: Processes) -> Conditions:
        """The conditions now, with the processes that were at work since."""
        others = self.processes().since(before, self._others_on_gpu())
        return self.read().model_copy(update={"others": others})

    def _others_on_gpu(self) -> list[int]:
        """Numbers of those that have the GPU open to compute; none where this process is not among them, as in a
        container, where NVML tells the host's numbers."""
        if self._nvml is None:
            return []
        nvml, device = self._nvml
        try:
            found = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(device)}
        except nvml.NVMLError:  # on a Jetson
            return []
        return sorted(found - {os.getpid()}) if os.getpid() in found else []

    def read(self) -> Conditions:
        """The conditions now; takes about a millisecond."""
        told = {**self._jetson.read(), **self._cpu.read(), "power_mode": self._power_mode}
        told |= {name: value for name, value in self._read_nvml().items() if value is not None}
        if self._cpu.throttled:
            told["throttling"] = (*(told["throttling"] or ()), "temperature of the CPU")
        return Conditions(**told)

    def need_power(self) -> None:
        """Raises MissingComponent, which says what was looked for, where nothing tells power."""
        if self.read().power_w is None:
            raise MissingComponent(
                f"nothing here tells power: {self._nvml_problem or 'NVML does not know that of this GPU'}, "
                f"and there is no INA3221 under {self._jetson.hwmon}",
                "Leave --power out, or measure on a machine that has one of them.",
            )

    @contextmanager
    def watching(self) -> Iterator[list[Conditions]]:
        """Read every :data:`INTERVAL` in a thread of its own; the list fills until the block ends."""
        readings: list[Conditions] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(INTERVAL):
                readings.append(self.read())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield readings
        finally:
            over.set()
            thread.join()

    def _read_nvml(self) -> dict[str, Any]:
        if self._nvml is None:
            return {}
        nvml, device = self._nvml

        def ask(function: str, *arguments: Any) -> Any:
            try:
                return getattr(nvml, function)(device, *arguments)
            except nvml.NVMLError:
                return None

        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")  # the name that all drivers know
        limit = ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "gpu_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_w": _watts(_instant_power(nvml, ask) or ask("nvmlDeviceGetPowerUsage")),
            "throttling": None
            if reasons is None
            else tuple(words for bit, words in _NVML_REASONS.items() if reasons & bit),
            "power_mode": f"at most {limit / 1e3:.0f} W" if limit else None,
        }


class _Cpu:
    """The cores: clocks, load, and how often x86 cores were too hot since this was made."""

    def __init__(self, root: Path) -> None:
        self._load, self._info = root / "proc/loadavg", root / "proc/cpuinfo"
        cores = root / "sys/devices/system/cpu"
        self._clocks = sorted(cores.glob("cpu*/cpufreq/scaling_cur_freq"))
        self._too_hot = sorted(cores.glob("cpu*/thermal_throttle/core_throttle_count"))
        self._before = sum(map(_number_or_0, self._too_hot))

    @property
    def throttled(self) -> bool:
        """Whether a core was too hot since."""
        return sum(map(_number_or_0, self._too_hot)) > self._before

    def read(self) -> dict[str, Any]:
        """Fields of :class:`Conditions`."""
        clocks = [clock for file in self._clocks if (clock := _scaled(file, 1e-3)) is not None]
        clocks = clocks or [float(mhz) for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)", _text(self._info) or "", re.M)]
        load = (_text(self._load) or "").split()
        return {"cpu_mhz": fmean(clocks) if clocks else None, "load": float(load[0]) if load else None}


class _Jetson:
    """The sensors of a Jetson, looked for once: files of sysfs that hold one number each."""

    def __init__(self, root: Path) -> None:
        self.hwmon = root / "sys/class/hwmon"
        self._rails = dict(_rails(self.hwmon))
        frequencies = sorted((root / "sys/class/devfreq").glob("*/cur_freq"))
        self._gpu = next((file for file in frequencies if _JETSON_GPU.search(file.parent.name)), None)
        self._memory = root / "sys/kernel/debug/bpmp/debug/clk/emc/rate"  # for root alone
        zones = {_text(file): file.with_name("temp") for file in (root / "sys/class/thermal").glob("*zone*/type")}
        self._temperature = next((zones[name] for name in ("gpu-thermal", "GPU-therm") if name in zones), None)
        self._alerts = {
            name.removesuffix("-throttle-alert"): file.with_name("cur_state")
            for file in sorted((root / "sys/class/thermal").glob("cooling_device*/type"))
            if (name := _text(file) or "").endswith("-throttle-alert")
        }
        self._over_currents = sorted(self.hwmon.glob("*/oc*_event_cnt"))
        self._before = self._count_over_currents()

    def read(self) -> dict[str, Any]:
        """Fields of :class:`Conditions`."""
        rails = {}
        for name, (current, voltage) in self._rails.items():
            milliamperes, millivolts = _number(current), _number(voltage)
            if milliamperes is not None and millivolts is not None:
                rails[name] = milliamperes * millivolts / 1e6
        inputs = [rails[name] for name in _INPUT_RAILS if name in rails]
        throttling = [f"temperature of {name}" for name, state in self._alerts.items() if _number(state)]
        if self._count_over_currents() > self._before:
            throttling.append("over-current")
        return {
            "gpu_mhz": _scaled(self._gpu, 1e-6),
            "memory_mhz": _scaled(self._memory, 1e-6),
            "temperature_c": _scaled(self._temperature, 1e-3),
            "power_w": (inputs[0] if inputs else sum(rails.values())) if rails else None,
            "rails_w": rails,
            "throttling": tuple(throttling) if self._alerts or self._over_currents else None,
        }

    def _count_over_currents(self) -> float:
        return sum(map(_number_or_0, self._over_currents))


def _rails(hwmon: Path) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """The files with current and voltage of each rail that an INA3221 measures."""
    for name in sorted(hwmon.glob("*/name")):
        if _text(name) == "ina3221":
            for channel in (1, 2, 3):
                files = [name.with_name(f"{kind}{channel}_input") for kind in ("curr", "in")]
                label = _text(name.with_name(f"in{channel}_label"))
                if label and label != "NC" and all(file.is_file() for file in files):
                    yield label, (files[0], files[1])


def _nvml() -> tuple[tuple[Any, Any] | None, str]:
    """NVML and its handle of the first CUDA device; else None and why."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
        bus = _bus_id()
        return (nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus) if bus else nvml.nvmlDeviceGetHandleByIndex(0)), ""
    except nvml.NVMLError as error:
        return None, f"NVML says {error}"


def _bus_id() -> bytes | None:
    """The PCI address of the first CUDA device: NVML numbers devices in another order."""
    bus = ctypes.create_string_buffer(16)
    try:
        driver.call("cuDeviceGetPCIBusId", bus, len(bus), driver.first_device())
    except (OSError, driver.DriverError):
        return None
    return bus.value


def _instant_power(nvml: Any, ask: Callable[..., Any]) -> int | None:
    """Power in mW now; None from drivers that tell a mean alone."""
    values = ask("nvmlDeviceGetFieldValues", [nvml.NVML_FI_DEV_POWER_INSTANT])
    return int(values[0].value.uiVal) if values and values[0].nvmlReturn == nvml.NVML_SUCCESS else None


def _power_mode() -> str | None:
    """The mode that nvpmodel, a program of Jetson Linux, says it is in."""
    try:
        done = run(["nvpmodel", "-q"], timeout=10)
    except MissingComponent:
        return None
    found = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    return found[1] if found else None


def _watts(milliwatts: int | None) -> float | None:
    return milliwatts / 1e3 if milliwatts is not None else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:  # also that of a sensor whose part of the chip is switched off
        return None


def _number(file: Path) -> float | None:
    text = _text(file)
    return float(text) if text else None


def _number_or_0(file: Path) -> float:
    return _number(file) or 0.0


def _scaled(file: Path | None, factor: float) -> float | None:
    number = _number(file) if file else None
    return number * factor if number is not None else None
