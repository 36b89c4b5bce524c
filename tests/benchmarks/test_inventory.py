"""devices.yaml: what a person writes there, what is meant, and what a recipe's `device` stands for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.devices import Local
from benchmarks.inventory import Entry, load_inventory, open_device
from benchmarks.ssh import Ssh, check_power_mode
from benchmarks.ssh_login import Address
from targets.errors import MeasurementError, RecipeError


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    path = tmp_path / "devices.yaml"
    path.write_text(
        "orin:\n  address: ssh://ann@10.0.0.5:2222\n  target: tensorrt\n  power_mode: 15W\n  python: /opt/edge/bin/python3\n"
        "pi: {address: ssh://pi}\n"
    )
    return path


def test_an_inventory_is_read_whole(inventory: Path) -> None:
    assert load_inventory(inventory) == {
        "orin": Entry(
            name="orin",
            address=Address("10.0.0.5", "ann", 2222),
            target="tensorrt",
            power_mode="15W",
            python="/opt/edge/bin/python3",
        ),
        "pi": Entry(name="pi", address=Address("pi")),
    }


def test_a_recipes_device_is_this_machine_a_name_or_an_address(inventory: Path, tmp_path: Path) -> None:
    orin = open_device("orin", inventory=inventory)
    there = open_device("ssh://ann@10.0.0.7", inventory=tmp_path / "absent.yaml")

    assert open_device("local", inventory=inventory) == Local()
    assert isinstance(orin, Ssh)
    assert (orin.name, orin.python, orin.power_mode) == ("orin", "/opt/edge/bin/python3", "15W")
    assert isinstance(there, Ssh)
    assert (there.name, there.address) == ("ssh://ann@10.0.0.7", Address("10.0.0.7", "ann"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("orin: {adress: ssh://pi}", "'orin' has no address"),
        ("orin: ssh://pi", "'orin' has no address"),
        ("orin: {address: ssh://pi, pyhton: /x}", r"unknown key 'orin.pyhton'; did you mean 'python'\?"),
        (
            "orin: {address: ssh://pi, target: tensort}",
            r"orin.target='tensort' does not exist; did you mean 'tensorrt'\?",
        ),
        ("orin: {address: ssh://pi, power_mode: 15}", "orin.power_mode=15 is not a word. Put it in quotes"),
        ("orin: {address: ssh://pi, python: ~/bin/python3}", "Write the whole path"),
        ("orin: {address: http://pi}", "not an address"),
        ("orin: {address: 'ssh://pi:raspberry@pi'}", "a password does not belong in a file"),
        ("local: {address: ssh://pi}", "'local' means something else"),
        ("kit: {address: ssh://pi}", "'kit' means something else"),
        ("[orin]", "holds no boards"),
        ("", "holds no boards"),
        ("orin: {address: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_fault_in_the_inventory_is_named_with_what_is_meant(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text(text)

    with pytest.raises(RecipeError, match=message) as refused:
        load_inventory(path)

    assert "raspberry" not in str(refused.value)


def test_the_examples_of_the_document_are_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    targets, inventory = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "devices.yaml").write_text(inventory)

    names = [target.get("device", "local") for target in yaml.safe_load(targets)["targets"]]

    assert names.pop() == "kit"
    for name in names:
        open_device(name, inventory=tmp_path / "devices.yaml")


def test_an_unknown_device_is_refused_with_the_name_that_is_near(inventory: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"device 'orion' does not stand in .*devices.yaml; did you mean 'orin'\?"):
        open_device("orion", inventory=inventory)
    with pytest.raises(RecipeError, match=r"device 'orin': there is no .*absent.yaml .*local, kit .*, ssh://user@host"):
        open_device("orin", inventory=tmp_path / "absent.yaml")


WORD = st.from_regex(r"[a-z][a-z0-9]{0,7}", fullmatch=True).filter(lambda word: word not in ("local", "kit"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(boards=st.dictionaries(WORD, st.tuples(WORD, st.none() | WORD), min_size=1, max_size=3))
def test_what_is_written_is_what_is_opened(boards: dict[str, tuple[str, str | None]], tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    written = {
        name: {"address": f"ssh://{host}"} | ({} if mode is None else {"power_mode": mode})
        for name, (host, mode) in boards.items()
    }
    path.write_text(yaml.safe_dump(written))

    for name, (host, mode) in boards.items():
        device = open_device(name, inventory=path)
        assert isinstance(device, Ssh)
        assert (device.name, device.address.host, device.power_mode) == (name, host, mode)


def test_a_result_from_another_power_mode_is_refused() -> None:
    check_power_mode("orin", None, {})
    check_power_mode("orin", "15W", {"power_mode": "15W"})

    with pytest.raises(MeasurementError, match=r"orin: its power mode is 7W, devices.yaml expects 15W.*nvpmodel"):
        check_power_mode("orin", "15W", {"power_mode": "7W"})
    with pytest.raises(MeasurementError, match="its power mode is not readable"):
        check_power_mode("orin", "15W", {})
