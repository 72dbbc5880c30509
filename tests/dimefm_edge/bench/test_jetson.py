"""jtop's figures in its own layout: no Jetson here, so that its client is a stand-in.

The dictionaries are what jetson-stats 7.2.0's own PowerService gave for a tree of INA3221 files
(f41d5cad, core/power.py, called on such a tree), and its TemperatureService's layout.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from dimefm_edge.bench.jetson import open_jtop
from dimefm_edge.bench.sensors import Recorder, find_sensors

ORIN_NX = {
    "rail": {
        "VDD_CPU_GPU_CV": {"volt": 5000, "curr": 400, "warn": 32760, "crit": 32760, "power": 2000,
                           "online": True, "avg": 2000},
        "VDD_SOC": {"volt": 5000, "curr": 300, "warn": 32760, "crit": 32760, "power": 1500,
                    "online": True, "avg": 1500},
    },
    "tot": {"volt": 5000, "curr": 1200, "warn": 32760, "crit": 32760, "power": 6000,
            "online": True, "avg": 6000, "name": "VDD_IN"},
}  # fmt: skip
AGX_ORIN = {
    "rail": {
        name: {"volt": volt, "curr": curr, "warn": 32760, "crit": 32760, "power": power,
               "online": True, "avg": power}
        for name, volt, curr, power in (
            ("VDD_CPU_CV", 19000, 100, 1900), ("VDD_GPU_SOC", 19000, 200, 3800),
            ("VIN_SYS_5V0", 5000, 700, 3500),
        )
    },
    "tot": {"power": 9200, "avg": 9200},
}  # fmt: skip
TEMPERATURES = {
    "cpu": {"temp": 47.5, "online": True}, "gpu": {"temp": 45.0, "online": True},
    "cv0": {"temp": -256, "online": False},
}  # fmt: skip
INA3221 = {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "9000"}


class JtopException(Exception):  # noqa: N818  (its own name)
    pass


class Client:
    """As much of jtop.jtop as is called."""

    power: object = ORIN_NX
    failure: Exception | None = None
    opened = 0

    def __init__(self, interval=0.5):
        assert interval > 0
        self._has_figures = False

    def start(self):
        if type(self).failure is not None:
            raise type(self).failure
        type(self).opened += 1

    def ok(self, spin=False):
        self._has_figures = True
        return True

    def close(self):
        type(self).opened -= 1

    @property
    def temperature(self):
        if not self._has_figures:
            raise KeyError("temperature")
        return TEMPERATURES


@pytest.fixture
def jtop(monkeypatch):
    """Gives a class of its own, whose figures a test may change."""
    client = type("Client", (Client,), {})
    module = ModuleType("jtop")
    module.jtop, module.JtopException = client, JtopException
    monkeypatch.setitem(sys.modules, "jtop", module)
    return client


def rails(root):
    chip = root / "sys/class/hwmon/hwmon3"
    chip.mkdir(parents=True)
    for name, text in INA3221.items():
        (chip / name).write_text(text)


def test_the_boards_total_stands_for_its_rails(jtop, tmp_path):
    rails(tmp_path)  # which are not read a second time
    sensors = find_sensors(tmp_path)
    reading = sensors.read()
    assert sensors.has_power
    assert reading.power_w == {"VDD_IN": 6.0}
    assert reading.temperature_c["cpu"] == 47.5
    assert "cv0" not in reading.temperature_c
    assert not sensors.notes
    assert jtop.opened == 1
    sensors.close()
    assert jtop.opened == 0


def test_a_board_without_a_total_rail(jtop, tmp_path):
    jtop.power = AGX_ORIN
    recorder = Recorder(find_sensors(tmp_path), interval_s=0.005)
    recorder.stop()
    assert {row["power_w"] for row in recorder.trace()} == {9.2}
    assert recorder.readings[0].power_w == {"all rails": 9.2}


def test_a_service_that_does_not_run_is_said_and_the_files_are_read(jtop, tmp_path):
    jtop.failure = JtopException(
        "The jtop.service is not active. Please run:\nsudo jtop --install-service"
    )
    rails(tmp_path)
    sensors = find_sensors(tmp_path)
    assert sensors.read().power_w == {"VDD_IN": 45.0}
    assert sensors.notes == [
        "power: jtop does not answer: The jtop.service is not active. Please run: "
        "sudo jtop --install-service"
    ]


def test_no_rail(jtop):
    jtop.power = {}
    notes: list[str] = []
    assert open_jtop(notes) is None
    assert notes == ["power: jtop knows no rail of this machine"]
    assert jtop.opened == 0


def test_a_service_that_ends_meanwhile_costs_its_figures_only(jtop, tmp_path):
    sensors = find_sensors(tmp_path)
    jtop.power = property(lambda self: 1 / 0)
    assert sensors.read().power_w == {}


def test_a_jetson_without_jtop_and_rails_is_told_what_to_install(tmp_path):
    release = tmp_path / "etc/nv_tegra_release"
    release.parent.mkdir()
    release.write_text("# R36 (release), REVISION: 4.3")
    assert "power: sudo pip3 install jetson-stats  (it reads this board's rails)" in (
        find_sensors(tmp_path).notes
    )
