"""What is told of boards and of this machine: what is there, what is missing, and the command that mends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import doctor
from benchmarks.device.isa import instruction_set
from benchmarks.device.survey import survey
from benchmarks.devices import Completed
from benchmarks.doctor import DevicesReport, check_devices, check_this_machine
from benchmarks.inventory import Entry
from benchmarks.ssh import Ssh
from targets.errors import DeviceError, RecipeError, TargetError

FOUND: dict[str, Any] = {
    "board": "Raspberry Pi 5 Model B Rev 1.0",
    "os": "Debian GNU/Linux 12 (bookworm)",
    "l4t": None,
    "kernel": "6.6",
    "arch": "aarch64",
    "cpus": 4,
    "ram_mib": 8000,
    "free_mib": 20000,
    "python": "3.11.2",
    "executable": "/usr/bin/python3",
    "externally_managed": True,
    "packages": {"numpy": "2.4", "onnxruntime": "1.32.0", "openvino": None, "tensorrt": None, "executorch": None},
}


class Board(Ssh):
    """A board that tells what it is given; `missing` is what its target lacks, `away` why it is not reached."""

    found: dict[str, Any] = FOUND
    missing: str | None = None
    mode: str | None = None
    away: str | None = None

    def put(self, path: Path) -> str:
        if self.away:
            raise DeviceError(self.away)
        return f"/there/{path.name}"

    def peek(self, argv: Any, *, timeout_s: float = 0.0) -> Completed:
        assert argv[-1] == "/there/survey.py"
        return Completed(0, json.dumps(self.found), "")

    def ask(self, *argv: str) -> dict[str, Any]:
        return {"missing": self.missing, "hard": {"power_mode": self.mode}}


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., DevicesReport]:
    """The report on an inventory of boards as they are given."""

    def check(entry: str = "address: ssh://pi", **changed: Any) -> DevicesReport:
        (tmp_path / "devices.yaml").write_text(f"pi: {{{entry}}}\n")

        def opened(entry: Entry) -> Ssh:
            board = Board(name=entry.name, address=entry.address)
            for name, value in changed.items():
                setattr(board, name, value)
            return board

        return check_devices(inventory=tmp_path / "devices.yaml", opened=opened)

    return check


def lacking(**packages: str | None) -> dict[str, Any]:
    return {**FOUND, "packages": {**FOUND["packages"], **packages}}


def test_a_ready_board_is_told_with_its_system_and_runtimes(look: Callable[..., DevicesReport]) -> None:
    report = look("address: ssh://pi, target: onnxruntime-cpu")

    assert report.failure is None
    text = report.text()
    for word in ("pi", "ready", "Raspberry Pi 5", "bookworm", "3.11.2", "onnxruntime 1.32.0"):
        assert word in text
    assert json.loads(json.dumps(report.to_json()))["boards"][0]["faults"] == []


def test_what_is_missing_comes_with_the_command_for_that_python(look: Callable[..., DevicesReport]) -> None:
    managed = look("address: ssh://pi, target: onnxruntime-cpu", missing="pip install onnxruntime")
    own = look(
        "address: ssh://pi, target: onnxruntime-cpu",
        missing="pip install onnxruntime",
        found={**FOUND, "externally_managed": False},
    )
    jetson = look("address: ssh://pi, target: tensorrt", missing="sudo apt-get install nvidia-jetpack")

    assert (
        managed.boards[0]
        .faults[0]
        .mend.startswith(
            "/usr/bin/python3 -m venv --system-site-packages ~/edgestill && ~/edgestill/bin/pip install onnxruntime"
        )
    )
    assert own.boards[0].faults[0].mend == "/usr/bin/python3 -m pip install onnxruntime"
    assert jetson.boards[0].faults[0].mend == "sudo apt-get install nvidia-jetpack"
    assert isinstance(own.failure, TargetError)
    assert "Run there: /usr/bin/python3 -m pip install onnxruntime" in str(own.failure)


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (lacking(numpy=None), "numpy is not installed for /usr/bin/python3"),
        (lacking(onnxruntime=None), "no runtime is installed"),
        ({**FOUND, "free_mib": 12}, "only 12 MiB are free"),
    ],
)
def test_what_would_stop_the_first_measurement_is_told(
    found: dict[str, Any], what: str, look: Callable[..., DevicesReport]
) -> None:
    report = look(found=found)

    assert report.boards[0].faults[0].what.startswith(what)
    assert "not ready" in report.text()


def test_a_board_that_is_not_reached_is_a_line_and_exit_code_6(look: Callable[..., DevicesReport]) -> None:
    report = look(away="pi: ssh://pi cannot be reached: timed out.")

    assert "not reached" in report.text()
    assert report.to_json()["exit_code"] == 6
    assert str(report.failure) == "pi: ssh://pi cannot be reached: timed out."


def test_another_power_mode_than_the_inventory_names_is_told(look: Callable[..., DevicesReport]) -> None:
    wrong = look("address: ssh://pi, power_mode: MAXN", mode="15W")
    right = look("address: ssh://pi, power_mode: MAXN", mode="MAXN")

    assert "its power mode is 15W, and MAXN is expected" in wrong.boards[0].faults[0].what
    assert right.failure is None


def test_names_are_of_the_inventory_or_addresses(tmp_path: Path) -> None:
    (tmp_path / "devices.yaml").write_text("pi: {address: ssh://pi}\norin: {address: ssh://orin}\n")

    def opened(entry: Entry) -> Ssh:
        return Board(name=entry.name, address=entry.address)

    def check(*names: str) -> list[str]:
        report = check_devices(names, inventory=tmp_path / "devices.yaml", opened=opened)
        return [board.name for board in report.boards]

    assert check() == ["pi", "orin"]
    assert check("orin", "ssh://ann@other") == ["orin", "ssh://ann@other"]
    with pytest.raises(RecipeError, match=r"device 'nano' does not stand in .*Known: pi, orin"):
        check("nano")


def test_this_machine_is_ready_and_tells_what_it_cannot_read() -> None:
    report = check_this_machine()

    assert report.failure is None
    assert report.targets["onnxruntime-cpu"] is None
    assert "onnxruntime-cpu" in report.text()
    isa = instruction_set(Path("/proc/cpuinfo").read_text())
    assert isa.words in report.text()
    assert report.found["packages"]["numpy"] is not None
    assert json.loads(json.dumps(report.to_json()))["exit_code"] == 0


def test_a_machine_without_any_runtime_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TARGETS", ("onnxruntime-cpu",))
    monkeypatch.setattr("targets.onnxruntime.find_spec", lambda name: None)

    report = check_this_machine()

    assert isinstance(report.failure, TargetError)
    assert "-m pip install onnxruntime" in str(report.failure)


def test_a_jetson_is_surveyed_by_its_files(tmp_path: Path) -> None:
    for name, text in {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\x00",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "proc/meminfo": "MemTotal:        7802016 kB\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    found = survey(tmp_path)

    assert found["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (found["os"], found["l4t"], found["ram_mib"]) == ("Ubuntu 22.04.5 LTS", "R36.4.3", 7619)
