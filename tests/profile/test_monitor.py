"""Clocks, temperature and power as sysfs of a Jetson and NVML tell them, and nothing where neither does."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from acmix_deploy.errors import MissingComponent
from acmix_deploy.profile import monitor
from acmix_deploy.profile.monitor import Conditions, Monitor, Power


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (root / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys" / name).write_text(f"{content}\n")
    return root


def ina3221(number: int, *rails: tuple[str, int, int]) -> dict[str, object]:
    """The files of a sensor: label, mV and mA of each channel."""
    files: dict[str, object] = {f"class/hwmon/hwmon{number}/name": "ina3221"}
    for channel, (label, millivolts, milliamperes) in enumerate(rails, 1):
        place = f"class/hwmon/hwmon{number}"
        files |= {f"{place}/in{channel}_label": label, f"{place}/in{channel}_input": millivolts}
        files |= {f"{place}/curr{channel}_input": milliamperes}
    # The driver's seventh channel is the sum of the shunts' voltages; it has no rail.
    return files | {f"class/hwmon/hwmon{number}/in7_label": "sum of shunt voltages"}


AGX_ORIN = {
    **ina3221(1, ("VDD_GPU_SOC", 19000, 500), ("VDD_CPU_CV", 19000, 200), ("VIN_SYS_5V0", 5000, 1000)),
    **ina3221(2, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 300), ("NC", 5000, 9000)),
    "class/hwmon/hwmon0/name": "tmp451",
    "class/hwmon/hwmon3/name": "soctherm_oc",
    "class/hwmon/hwmon3/oc1_event_cnt": 4,
    "class/hwmon/hwmon3/oc3_event_cnt": 0,
    "class/devfreq/15340000.vic/cur_freq": 115200000,
    "class/devfreq/17000000.gpu/cur_freq": 1300500000,
    "kernel/debug/bpmp/debug/clk/emc/rate": 3199000000,
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": 61000,
    "class/thermal/thermal_zone1/type": "gpu-thermal",
    "class/thermal/thermal_zone1/temp": 48500,
    "class/thermal/cooling_device1/type": "cpu-throttle-alert",
    "class/thermal/cooling_device1/cur_state": 0,
    "class/thermal/cooling_device2/type": "gpu-throttle-alert",
    "class/thermal/cooling_device2/cur_state": 0,
    "class/thermal/cooling_device3/type": "pwm-fan",
    "class/thermal/cooling_device3/cur_state": 2,
}


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No NVML and no nvpmodel but those that a test makes."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_a_jetson_tells_everything(tmp_path: Path) -> None:
    nvpmodel = tmp_path / "bin" / "nvpmodel"
    nvpmodel.write_text("#!/bin/sh\necho 'NV Fan Mode:quiet'\necho 'NV Power Mode: MODE_30W'\necho 2\n")
    nvpmodel.chmod(0o755)
    machine = Monitor(write(tmp_path, AGX_ORIN))
    machine.need_power()
    found = machine.read()
    rails = {"VDD_GPU_SOC": 9.5, "VDD_CPU_CV": 3.8, "VIN_SYS_5V0": 5.0, "VDDQ_VDD2_1V8AO": 1.5}
    assert found.rails_w == pytest.approx(rails)
    assert found.power_w == pytest.approx(19.8)
    assert (found.gpu_mhz, found.memory_mhz) == pytest.approx((1300.5, 3199))
    assert found.temperature_c == pytest.approx(48.5)
    assert (found.throttling, found.power_mode) == ((), "MODE_30W")


def test_a_rail_that_feeds_the_others_is_the_whole_power(tmp_path: Path) -> None:
    nano = ina3221(1, ("VDD_IN", 5000, 1500), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, 300))
    assert Monitor(write(tmp_path, nano)).read().power_w == pytest.approx(7.5)


def test_throttling_is_that_since_the_monitor_began(tmp_path: Path) -> None:
    machine = Monitor(write(tmp_path, AGX_ORIN))
    write(tmp_path, {"class/thermal/cooling_device2/cur_state": 1, "class/hwmon/hwmon3/oc3_event_cnt": 1})
    assert machine.read().throttling == ("temperature of gpu", "over-current")


def test_a_sensor_that_does_not_answer_is_none(tmp_path: Path) -> None:
    machine = Monitor(write(tmp_path, AGX_ORIN))
    (tmp_path / "sys/class/thermal/thermal_zone1/temp").unlink()  # EAGAIN while the GPU is off
    (tmp_path / "sys/class/hwmon/hwmon1/curr2_input").unlink()
    (tmp_path / "sys/kernel/debug/bpmp/debug/clk/emc/rate").unlink()
    found = machine.read()
    assert (found.temperature_c, found.memory_mhz) == (None, None)
    assert "VDD_CPU_CV" not in found.rails_w
    assert found.power_w == pytest.approx(16.0)


@pytest.mark.parametrize("name", ["17000000.ga10b", "17000000.gv11b", "57000000.gpu", "gpu-gpc-0"])
def test_names_of_the_gpu(tmp_path: Path, name: str) -> None:
    files = {f"class/devfreq/{name}/cur_freq": 918000000, "class/devfreq/0.gpubus/cur_freq": 1}
    assert Monitor(write(tmp_path, files)).read().gpu_mhz == pytest.approx(918)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    machine = Monitor(
        write(tmp_path, {"class/hwmon/hwmon0/name": "coretemp", "class/hwmon/hwmon0/in1_label": "VDD_IN"})
    )
    assert machine.read() == Conditions()
    assert not machine.read().known
    with pytest.raises(MissingComponent, match=r"nvidia-ml-py is not installed.*no INA3221 under .*hwmon") as raised:
        machine.need_power()
    assert raised.value.exit_code == 3
    with pytest.raises(MissingComponent, match="not of the CPU"):
        Monitor(tmp_path, nvml=False).need_power()


def test_clocks_and_load_of_the_cpu(tmp_path: Path) -> None:
    write(tmp_path, {"devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 7})
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/loadavg").write_text("1.25 0.50 0.10 2/345 6789\n")
    (tmp_path / "proc/cpuinfo").write_text("model name\t: a CPU\ncpu MHz\t\t: 2000.5\n\ncpu MHz\t\t: 3000.5\n")
    machine = Monitor(tmp_path, nvml=False)
    assert machine.read() == Conditions(cpu_mhz=2500.5, load=1.25)
    clocks = {
        f"devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": mhz * 1000 for core, mhz in ((0, 800), (1, 2200))
    }
    write(tmp_path, {**clocks, "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": 8})
    assert Monitor(tmp_path, nvml=False).read() == Conditions(cpu_mhz=1500, load=1.25)
    assert machine.read().throttling == ("temperature of the CPU",)


class NVMLError(Exception):
    pass


def fake_nvml(**changed: object) -> SimpleNamespace:
    """Stands in for pynvml; an exception among ``changed`` is raised by that call."""

    def call(answer: object) -> object:
        def function(*_: object) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return function

    answers: dict[str, object] = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByIndex": "device",
        "nvmlDeviceGetHandleByPciBusId": "device",
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4 | 0x40 | 0x100,
        "nvmlDeviceGetEnforcedPowerLimit": 700000,
        "nvmlDeviceGetTemperature": 41,
        "nvmlDeviceGetPowerUsage": 150500,
        "nvmlDeviceGetFieldValues": [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=203000))],
    }
    made = SimpleNamespace(**{name: call(answer) for name, answer in {**answers, **changed}.items()})
    made.nvmlDeviceGetClockInfo = lambda device, kind: {1: 1980, 2: 2619}[kind]
    for name, value in {"CLOCK_SM": 1, "CLOCK_MEM": 2, "TEMPERATURE_GPU": 0, "SUCCESS": 0}.items():
        setattr(made, f"NVML_{name}", value)
    made.NVML_FI_DEV_POWER_INSTANT = 186
    made.NVMLError = NVMLError
    return made


def test_nvml_tells_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert Monitor(tmp_path).read() == Conditions(
        gpu_mhz=1980,
        memory_mhz=2619,
        temperature_c=41,
        power_w=203.0,
        throttling=("power limit", "temperature, by the hardware"),
        power_mode="at most 700 W",
    )
    assert Monitor(tmp_path, nvml=False).read() == Conditions()


@pytest.mark.parametrize(
    "values", [NVMLError("Not Supported"), [SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(uiVal=999000))]]
)
def test_drivers_that_tell_the_mean_power_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: object
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetFieldValues=values))
    assert Monitor(tmp_path).read().power_w == pytest.approx(150.5)


def test_what_nvml_does_not_support_is_none_or_the_jetsons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = NVMLError("Not Supported")
    names = ("FieldValues", "PowerUsage", "CurrentClocksThrottleReasons", "EnforcedPowerLimit", "Temperature")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{f"nvmlDeviceGet{name}": refusal for name in names}))
    assert Monitor(tmp_path).read() == Conditions(gpu_mhz=1980, memory_mhz=2619)
    with pytest.raises(MissingComponent, match="NVML does not know"):
        Monitor(tmp_path).need_power()
    found = Monitor(write(tmp_path, AGX_ORIN)).read()
    assert (found.gpu_mhz, found.temperature_c, found.throttling) == (1980, 48.5, ())
    assert found.power_w == pytest.approx(19.8)


def test_without_a_driver_nvml_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = NVMLError("NVML Shared Library Not Found")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=missing))
    with pytest.raises(MissingComponent, match="NVML says NVML Shared Library Not Found, and there is no INA3221"):
        Monitor(tmp_path).need_power()


def test_the_names_used_are_those_of_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml")
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    for name in vars(fake_nvml()):
        assert hasattr(pynvml, name), name
    for bit, words in monitor._NVML_REASONS.items():
        (constant,) = (
            name for name, value in vars(pynvml).items() if name.startswith("nvmlClocksEventReason") and value == bit
        )
        assert any(word in constant.lower() for word in words.replace(",", "").split()), (constant, words)


def test_watching_reads_in_a_thread_until_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "INTERVAL", 0.002)
    threads = threading.active_count()
    with Monitor(write(tmp_path, AGX_ORIN)).watching() as readings:
        deadline = time.perf_counter() + 10
        while len(readings) < 3 and time.perf_counter() < deadline:
            time.sleep(0.002)
        assert threading.active_count() == threads + 1
    count = len(readings)
    assert count >= 3
    assert threading.active_count() == threads
    time.sleep(0.02)
    assert len(readings) == count
    assert {reading.temperature_c for reading in readings} == {48.5}


def test_energy_is_mean_power_times_time() -> None:
    found = Power.of([Conditions(power_w=10.0), Conditions(), Conditions(power_w=20.0)], inference_ms=4.0, images=8)
    assert (found.mean_w, found.energy_mj, found.images) == (15.0, 60.0, 8)
