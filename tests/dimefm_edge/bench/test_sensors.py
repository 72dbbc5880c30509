"""Counters, rails and throttling, read from a copy of the files that Linux has."""

from __future__ import annotations

import itertools
import os
import time

import pytest

from dimefm_edge.bench.sensors import Reading, Recorder, find_sensors


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


RAPL = {
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "1000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "5000000\n",
    # A part of the package, which must not be counted again.
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "700000\n",
}
JETSON = {
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon3/in1_input": "5000\n",
    "sys/class/hwmon/hwmon3/curr1_input": "1200\n",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon3/in2_input": "5000\n",
    "sys/class/hwmon/hwmon3/curr2_input": "400\n",
}
THROTTLE = {
    "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
}


def test_energy_of_a_package_across_its_wrap(tmp_path):
    write(tmp_path, RAPL)
    sensors = find_sensors(tmp_path)
    assert sensors.has_power
    before = sensors.read()
    assert before.energy_j == {"package-0": 1.0}
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "3500000"})
    after = sensors.read()
    assert sensors.joules(before, after) == pytest.approx(2.5)
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "500000"})
    assert sensors.joules(after, sensors.read()) == pytest.approx(2.0)


def test_a_jetsons_total_is_not_added_to_its_parts(tmp_path):
    write(tmp_path, JETSON)
    assert find_sensors(tmp_path).read().power_w == {"VDD_IN": 6.0}


def test_rails_without_a_total_are_all_told(tmp_path):
    write(tmp_path, {k: v.replace("VDD_IN", "VDD_GPU_SOC") for k, v in JETSON.items()})
    assert sum(find_sensors(tmp_path).read().power_w.values()) == pytest.approx(8.0)


def test_no_permission_is_said_with_the_command_that_gives_it(tmp_path):
    write(tmp_path, RAPL)
    file = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    file.chmod(0)
    if os.geteuid() != 0:
        notes, has_power = _look(tmp_path)
    else:
        notes, has_power = _look_as_nobody(tmp_path)
    assert not has_power
    assert notes == [f"energy of package-0: only root may read {file}  (sudo chmod a+r {file})"]


def _look(root):
    sensors = find_sensors(root)
    return sensors.notes, sensors.has_power


def _look_as_nobody(root):
    """In a child without root's rights; it loads nothing after it gave them up."""
    for folder in (root, *root.parents):
        if folder.stat().st_uid == os.geteuid() and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o055)
    reader, writer = os.pipe()
    find_sensors(root / "none")  # imports what it needs
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        sensors = find_sensors(root)
        os.write(writer, "\n".join([str(sensors.has_power), *sensors.notes]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        has_power, *notes = stream.read().split("\n")
    os.waitpid(pid, 0)
    return notes, has_power == "True"


def test_nothing_to_read_is_said(tmp_path):
    sensors = find_sensors(tmp_path)
    assert not sensors.has_power
    assert sensors.notes == ["energy: this machine has no counter that Linux shows"]


def test_throttling_since_the_start(tmp_path):
    write(tmp_path, THROTTLE)
    sensors = find_sensors(tmp_path)
    recorder = Recorder(sensors, interval_s=0.01)
    assert recorder.throttled() == []  # what was before does not count
    write(tmp_path, {
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "9",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
    })  # fmt: skip
    assert recorder.throttled() == [
        "Raspberry Pi: throttled", "Raspberry Pi: under-voltage", "cpu0 (core)"
    ]  # fmt: skip
    recorder.stop()


def test_mean_power_over_an_interval(tmp_path):
    write(tmp_path, JETSON)
    recorder = Recorder(find_sensors(tmp_path), interval_s=0.005)
    begun = time.monotonic()
    time.sleep(0.1)
    assert recorder.mean_power_w(begun, time.monotonic()) == pytest.approx(6.0)
    assert recorder.mean_power_w(begun - 10, begun - 9) is None
    recorder.stop()
    trace = recorder.trace()
    assert all(row["power_w"] == pytest.approx(6.0) for row in trace)
    assert all(b["at_s"] >= a["at_s"] for a, b in itertools.pairwise(trace))


def test_power_by_counters(tmp_path):
    write(tmp_path, RAPL)
    recorder = Recorder(find_sensors(tmp_path), interval_s=100)
    recorder.readings = [
        Reading(0.0, {"package-0": 10.0}, {}, {}, {}),
        Reading(2.0, {"package-0": 16.0}, {}, {}, {}),
    ]
    assert recorder.mean_power_w(0.0, 2.0) == pytest.approx(3.0)
    recorder.stop()
