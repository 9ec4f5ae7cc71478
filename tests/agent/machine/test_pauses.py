"""How long a VM stood still, by an RTC and an uptime that are files and numbers here."""

from pathlib import Path

import pytest
from attrs import define

from agent.machine.pauses import Pauses


@define
class Machine:
    rtc: Path
    uptime_s: float = 100.0
    world_s: float = 1_800_000_000.9

    def go_on(self, for_s: float, *, paused_s: float = 0) -> None:
        self.uptime_s += for_s
        self.world_s += for_s + paused_s
        (self.rtc / "since_epoch").write_text(f"{int(self.world_s)}\n")

    def pauses(self) -> Pauses:
        return Pauses(self.rtc, lambda: self.uptime_s)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.go_on(0)
    return machine


def test_a_vm_that_was_never_looked_at_has_missed_nothing(machine: Machine) -> None:
    assert machine.pauses().missed_s() == 0


@pytest.mark.parametrize("for_s", [0.0, 0.3, 50.7, 90_000.0])
def test_a_pause_is_as_long_as_the_rtc_has_it_to_a_second(machine: Machine, for_s: float) -> None:
    pauses = machine.pauses()
    pauses.missed_s()
    machine.go_on(for_s, paused_s=600)
    assert abs(pauses.missed_s() - 600) <= 1
    # Once.
    machine.go_on(1)
    assert pauses.missed_s() == 0


def test_a_vm_that_goes_on_has_missed_nothing_whenever_it_is_looked_at(machine: Machine) -> None:
    pauses = machine.pauses()
    for step in range(200):
        machine.go_on(step * 0.37)
        assert pauses.missed_s() == 0


def test_a_rate_that_is_a_little_wrong_is_no_pause(machine: Machine) -> None:
    pauses = machine.pauses()
    pauses.missed_s()
    machine.go_on(86_400, paused_s=40)
    assert pauses.missed_s() == 0


def test_an_rtc_that_is_set_back_is_no_pause(machine: Machine) -> None:
    pauses = machine.pauses()
    pauses.missed_s()
    machine.go_on(1, paused_s=-3600)
    assert pauses.missed_s() == 0


@pytest.mark.parametrize("content", [None, "", "soon\n"])
def test_without_an_rtc_that_tells_nothing_is_missed(machine: Machine, content: str | None) -> None:
    pauses = machine.pauses()
    for _ in range(2):
        assert pauses.missed_s() == 0
        machine.go_on(1, paused_s=600)
        file = machine.rtc / "since_epoch"
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
