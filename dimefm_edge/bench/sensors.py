"""Power, temperature, clocks and throttling, where this machine tells them; why not, where not.

Read from Linux's own files (RAPL's counters, a Jetson's INA3221 rails, CPU throttle counts, the
Raspberry Pi's firmware), psutil, NVML where nvidia-ml-py is installed, and a Jetson's jtop.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dimefm_edge.bench.jetson import Jtop, open_jtop

_INTERVAL_S = 0.1
_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0_TOTAL")
_JETSON = "etc/nv_tegra_release"
_RPI_THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
_RPI_BITS = {0: "under-voltage", 1: "its clock was capped", 2: "throttled", 3: "too hot"}


@dataclass(frozen=True)
class Reading:
    """What was read at one moment."""

    at_s: float
    """time.monotonic()."""
    energy_j: dict[str, float]
    """Counters by source, counting up."""
    power_w: dict[str, float]
    """By source."""
    temperature_c: dict[str, float]
    clock_mhz: dict[str, float]


@dataclass
class Sensors:
    """What can be read here; `notes` say what cannot, and why."""

    notes: list[str] = field(default_factory=list)
    _energy: dict[str, Callable[[], float]] = field(default_factory=dict)
    _power: dict[str, Callable[[], float]] = field(default_factory=dict)
    _throttle: dict[str, Callable[[], int]] = field(default_factory=dict)
    _wrap_j: dict[str, float] = field(default_factory=dict)
    _gpu: Any = None
    _jtop: Jtop | None = None

    @property
    def has_power(self) -> bool:
        return bool(self._energy or self._power or self._gpu or self._jtop)

    def read(self) -> Reading:
        """Everything that answers now."""
        clocks = _psutil_clock()
        temperatures = _psutil_temperatures()
        power = _each(self._power)
        if self._gpu is not None:
            more = self._gpu.read()
            temperatures |= more.get("temperature_c", {})
            clocks |= more.get("clock_mhz", {})
            power |= more.get("power_w", {})
        if self._jtop is not None:
            with contextlib.suppress(Exception):  # its service may end while the bench goes on
                power |= self._jtop.power_w()
                temperatures |= self._jtop.temperature_c()
        return Reading(time.monotonic(), _each(self._energy), power, temperatures, clocks)

    def close(self) -> None:
        """Leave services that were asked."""
        if self._jtop is not None:
            self._jtop.close()

    def gpu_memory_mib(self, pid: int) -> float | None:
        """What a process holds of the GPU, where NVML tells."""
        return None if self._gpu is None else self._gpu.memory_mib(pid)

    def throttle_counts(self) -> dict[str, int]:
        """Counters and flags by source; whoever grew between two reads was throttled."""
        counts: dict[str, int] = {}
        for name, read in self._throttle.items():
            with contextlib.suppress(OSError, ValueError):
                counts[name] = read()
        if self._gpu is not None:
            counts |= self._gpu.throttle()
        return counts

    def joules(self, first: Reading, last: Reading) -> float | None:
        """Energy between two readings by the counters; None without any."""
        if not self._energy:
            return None
        total = 0.0
        for name, after in last.energy_j.items():
            spent = after - first.energy_j.get(name, after)
            total += spent if spent >= 0 else spent + self._wrap_j.get(name, 0.0)
        return total


def find_sensors(root: Path = Path("/")) -> Sensors:
    """Look what this machine tells.

    Args:
        root: Where `sys` lies; another one for tests.
    """
    sensors = Sensors()
    _find_rapl(sensors, root)
    sensors._jtop = open_jtop(sensors.notes)
    if sensors._jtop is None:
        _find_rails(sensors, root)
    _find_throttle(sensors, root)
    sensors._gpu = _find_gpu(sensors)
    if not sensors.has_power and (root / _JETSON).exists():
        sensors.notes.append("power: sudo pip3 install jetson-stats  (it reads this board's rails)")
    if not sensors.has_power and not sensors.notes:
        sensors.notes.append("energy: this machine has no counter that Linux shows")
    return sensors


class Recorder:
    """Reads sensors in the background until it is stopped."""

    def __init__(self, sensors: Sensors, *, interval_s: float = _INTERVAL_S) -> None:
        self._sensors, self._interval_s = sensors, interval_s
        self.readings: list[Reading] = [sensors.read()]
        self._before = sensors.throttle_counts()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.readings.append(self._sensors.read())

    def throttled(self) -> list[str]:
        """What was throttled since the start."""
        after = self._sensors.throttle_counts()
        return sorted(name for name, count in after.items() if count > self._before.get(name, 0))

    def mean_power_w(self, start_s: float, end_s: float) -> float | None:
        """Mean over an interval of time.monotonic(), all sources summed; None without any."""
        inside = [r for r in self.readings if start_s <= r.at_s <= end_s]
        if len(inside) >= 2 and inside[0].energy_j:
            joules = self._sensors.joules(inside[0], inside[-1])
            seconds = inside[-1].at_s - inside[0].at_s
            return joules / seconds if joules is not None and seconds > 0 else None
        powers = [sum(r.power_w.values()) for r in inside if r.power_w]
        return sum(powers) / len(powers) if powers else None

    def trace(self) -> list[dict[str, Any]]:
        """Seconds since the start, watts, hottest degrees Celsius and mean clock, for plots."""
        begun = self.readings[0].at_s
        rows = []
        for before, now in zip(self.readings, self.readings[1:], strict=False):
            joules = self._sensors.joules(before, now) if now.energy_j else None
            power = joules / (now.at_s - before.at_s) if joules is not None else None
            if power is None and now.power_w:
                power = sum(now.power_w.values())
            rows.append({
                "at_s": round(now.at_s - begun, 3),
                "power_w": power,
                "temperature_c": max(now.temperature_c.values(), default=None),
                "clock_mhz": now.clock_mhz.get("cpu"),
            })  # fmt: skip
        return rows

    def _record(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.readings.append(self._sensors.read())


# ----------------------------------------------------------------------------- sources


def _find_rapl(sensors: Sensors, root: Path) -> None:
    """Packages only: cores and DRAM are parts of them, or count apart by platform."""
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
    for zone in zones:
        file = zone / "energy_uj"
        name = _text(zone / "name") or zone.name
        try:
            float(file.read_text())
        except PermissionError:
            sensors.notes.append(
                f"energy of {name}: only root may read {file}  (sudo chmod a+r {file})"
            )
            continue
        except (OSError, ValueError) as error:
            sensors.notes.append(f"energy of {name}: {file} cannot be read: {error}")
            continue
        sensors._energy[name] = lambda file=file: float(file.read_text()) / 1e6  # type: ignore[misc]
        with contextlib.suppress(OSError, ValueError):
            sensors._wrap_j[name] = float((zone / "max_energy_range_uj").read_text()) / 1e6


def _find_rails(sensors: Sensors, root: Path) -> None:
    """A Jetson's INA3221: volts and amperes by rail; the module's own total where it has one."""
    rails: dict[str, Callable[[], float]] = {}
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(chip / "name") != "ina3221":
            continue
        for label in sorted(chip.glob("in*_label")):
            place = label.name.removeprefix("in").removesuffix("_label")
            volts, amperes = chip / f"in{place}_input", chip / f"curr{place}_input"
            name = _text(label)
            if name and volts.is_file() and amperes.is_file():
                rails[name] = lambda v=volts, a=amperes: (  # type: ignore[misc]
                    float(v.read_text()) * float(a.read_text()) / 1e6
                )
    totals = [name for name in _TOTAL_RAILS if name in rails]
    sensors._power |= {totals[0]: rails[totals[0]]} if totals else rails


def _find_throttle(sensors: Sensors, root: Path) -> None:
    for cpu in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*")):
        for what in ("core", "package"):
            file = cpu / f"thermal_throttle/{what}_throttle_count"
            if file.is_file():
                sensors._throttle[f"{cpu.name} ({what})"] = lambda f=file: int(f.read_text())  # type: ignore[misc]
    file = root / _RPI_THROTTLED
    if file.is_file():
        for bit, what in _RPI_BITS.items():
            sensors._throttle[f"Raspberry Pi: {what}"] = lambda f=file, b=bit: (  # type: ignore[misc]
                int(f.read_text().strip(), 16) >> b & 1
            )


def _find_gpu(sensors: Sensors) -> _Gpu | None:
    try:
        import pynvml
    except ImportError:
        if Path("/dev/nvidiactl").exists():
            sensors.notes.append("GPU: pip install nvidia-ml-py  (its power and clocks)")
        return None
    try:
        pynvml.nvmlInit()
        return _Gpu(pynvml) if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError:  # no driver: no NVIDIA GPU
        return None


class _Gpu:
    """The first GPU, through NVML."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(0)

    def read(self) -> dict[str, dict[str, float]]:
        nvml, handle = self._nvml, self._handle
        values: dict[str, dict[str, float]] = {}
        with contextlib.suppress(nvml.NVMLError):
            values["power_w"] = {"gpu": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3}
        with contextlib.suppress(nvml.NVMLError):
            degrees = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            values["temperature_c"] = {"gpu": float(degrees)}
        with contextlib.suppress(nvml.NVMLError):
            clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            values["clock_mhz"] = {"gpu": float(clock)}
        return values

    def throttle(self) -> dict[str, int]:
        nvml = self._nvml
        slow = (
            nvml.nvmlClocksThrottleReasonHwSlowdown
            | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
            | nvml.nvmlClocksThrottleReasonSwPowerCap
        )
        with contextlib.suppress(nvml.NVMLError):
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
            return {"gpu": int(bool(reasons & slow))}
        return {}

    def memory_mib(self, pid: int) -> float | None:
        with contextlib.suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == pid and process.usedGpuMemory is not None:
                    return float(process.usedGpuMemory) / 2**20
        return None


def _psutil_temperatures() -> dict[str, float]:
    import psutil  # type: ignore[import-untyped]

    if not hasattr(psutil, "sensors_temperatures"):  # Linux and FreeBSD have it
        return {}
    with contextlib.suppress(OSError, ValueError):
        found = psutil.sensors_temperatures()
        return {
            f"{chip} {entry.label}".strip(): float(entry.current)
            for chip, entries in found.items()
            for entry in entries
            if entry.current and 0 < entry.current < 150
        }
    return {}


def _psutil_clock() -> dict[str, float]:
    import psutil

    with contextlib.suppress(OSError, ValueError, NotImplementedError, AttributeError):
        frequency = psutil.cpu_freq()
        if frequency is not None and frequency.current:
            return {"cpu": float(frequency.current)}
    return {}


def _each(readers: dict[str, Callable[[], float]]) -> dict[str, float]:
    values = {}
    for name, read in readers.items():
        with contextlib.suppress(OSError, ValueError):
            values[name] = read()
    return values


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
