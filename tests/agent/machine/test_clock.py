"""When the VM's clock is stepped, and by what. No clock is set here, only noted."""

import errno
from pathlib import Path

import pytest
from attrs import define, evolve, field

from agent.machine.clock import HostClock
from protocol.values import ClockStep

SECOND = 10**9
MADE = 1_700_000_000 * SECOND
NOW = 1_800_000_000 * SECOND


@define
class Machine:
    """A /sys and a /dev of its own, and a clock that stands still until it is set."""

    directory: Path
    now: int = NOW
    set_to: list[int] = field(factory=list)

    def clock(self) -> HostClock:
        for name in ("ptp", "dev"):
            (self.directory / name).mkdir(exist_ok=True)
        return HostClock(
            not_before_ns=MADE,
            ptp_class=self.directory / "ptp",
            rtc=self.directory / "rtc0",
            devices=self.directory / "dev",
            now_ns=lambda: self.now,
            set_ns=self.set_to.append,
            ptp_precise=self._never,
            ptp_time=self._never,
        )

    def _never(self, descriptor: int) -> int:
        raise AssertionError("nobody's PTP clock was to be read")

    def add_ptp(self, name: str, clock_name: str) -> None:
        (self.directory / "ptp" / name).mkdir(parents=True)
        (self.directory / "ptp" / name / "clock_name").write_text(f"{clock_name}\n")
        (self.directory / "dev").mkdir(exist_ok=True)
        (self.directory / "dev" / name).touch()

    def add_rtc(self, seconds: int, hctosys: int = 1) -> None:
        (self.directory / "rtc0").mkdir()
        (self.directory / "rtc0/since_epoch").write_text(f"{seconds}\n")
        (self.directory / "rtc0/hctosys").write_text(f"{hctosys}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def done(source: str | None, step_ns: int = 0) -> ClockStep:
    return ClockStep(ok=True, source=source, step_ns=step_ns)


class TestThePtpClockOfTheHypervisor:
    def test_is_believed_before_anything_else(self, machine: Machine) -> None:
        machine.add_ptp("ptp0", "e1000e")
        machine.add_ptp("ptp1", "KVM virtual PTP")
        machine.add_rtc(NOW // SECOND + 500)
        opened = []

        def precise(descriptor: int) -> tuple[int, int]:
            opened.append(Path(f"/proc/self/fd/{descriptor}").readlink())
            return NOW + 70 * SECOND, NOW + 10 * SECOND

        clock = evolve(machine.clock(), ptp_precise=precise)
        assert clock.follow_host(NOW + 999 * SECOND) == done("ptp_kvm", 60 * SECOND)
        assert machine.set_to == [NOW + 60 * SECOND]
        assert clock.follow_ptp() == clock.set_at_boot(None, 3.0) == done("ptp_kvm", 60 * SECOND)
        assert opened == [machine.directory / "dev/ptp1"] * 3

    def test_is_read_as_a_clock_where_it_cannot_tell_both_times_at_once(
        self, machine: Machine
    ) -> None:
        machine.add_ptp("ptp0", "KVM virtual PTP")

        def precise(descriptor: int) -> tuple[int, int]:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        clock = evolve(
            machine.clock(), ptp_precise=precise, ptp_time=lambda descriptor: NOW - 5 * SECOND
        )
        assert clock.follow_ptp() == done("ptp_kvm", -5 * SECOND)
        assert machine.set_to == [NOW - 5 * SECOND]

    def test_that_differs_by_less_than_a_message_takes_changes_nothing(
        self, machine: Machine
    ) -> None:
        machine.add_ptp("ptp0", "KVM virtual PTP")
        clock = evolve(machine.clock(), ptp_precise=lambda _: (NOW + 9_000_000, NOW))
        assert clock.follow_host() == done("ptp_kvm")
        assert machine.set_to == []

    def test_that_fails_makes_room_for_the_next_source_and_is_named_where_there_is_none(
        self, machine: Machine
    ) -> None:
        machine.add_ptp("ptp0", "KVM virtual PTP")
        (machine.directory / "dev/ptp0").unlink()
        assert machine.clock().follow_host(NOW + SECOND) == done("request", SECOND)
        failed = machine.clock().follow_host()
        assert not failed.ok
        assert failed.error == f"No such file or directory: {machine.directory}/dev/ptp0"


class TestWithoutOne:
    def test_the_time_of_a_request_comes_before_the_rtc(self, machine: Machine) -> None:
        machine.add_rtc(NOW // SECOND + 500)
        assert machine.clock().follow_host(NOW - 3 * SECOND) == done("request", -3 * SECOND)
        assert machine.set_to == [NOW - 3 * SECOND]

    @pytest.mark.parametrize(
        ("off_s", "step_ns"), [(1, 0), (-1, 0), (3, 3 * SECOND), (-3, -3 * SECOND)]
    )
    def test_the_rtc_is_believed_as_far_as_its_seconds_go(
        self, machine: Machine, off_s: int, step_ns: int
    ) -> None:
        machine.add_rtc(NOW // SECOND + off_s)
        assert machine.clock().follow_host() == done("rtc", step_ns)
        assert machine.set_to == [NOW + step_ns] * bool(step_ns)

    def test_nothing_is_done_and_nothing_is_wrong_where_nobody_tells_a_time(
        self, machine: Machine
    ) -> None:
        machine.add_rtc(NOW // SECOND + 500)
        assert machine.clock().follow_ptp() == done(None)
        assert machine.set_to == []


def test_a_time_before_the_image_was_made_is_nobodys(machine: Machine) -> None:
    machine.add_ptp("ptp0", "KVM virtual PTP")
    machine.add_rtc(0)
    clock = evolve(machine.clock(), ptp_precise=lambda _: (SECOND, NOW))
    refused = clock.follow_host(MADE - 1)
    assert (refused.ok, refused.source, refused.step_ns) == (False, None, 0)
    assert refused.error is not None
    for who, when in (
        ("ptp0", "1970-01-01 00:00:01"),
        ("the request", "2023-11-14 22:13:19"),
        ("the RTC", "1970-01-01 00:00:00"),
    ):
        assert f"{who} says {when}, when this image had not been made" in refused.error
    assert machine.set_to == []


@pytest.mark.parametrize(
    "error", [OSError(errno.EPERM, "Operation not permitted"), OverflowError("too large")]
)
def test_a_clock_that_cannot_be_set_is_told_with_the_cause(
    machine: Machine, error: Exception
) -> None:
    def refuse(time_ns: int) -> None:
        raise error

    failed = evolve(machine.clock(), set_ns=refuse).follow_host(NOW + SECOND)
    assert (failed.ok, failed.source, failed.step_ns) == (False, "request", 0)
    assert failed.error is not None
    assert failed.error.startswith("set the clock: ")


class TestAfterAPause:
    def test_the_clock_is_stepped_by_what_it_has_missed(self, machine: Machine) -> None:
        machine.add_rtc(NOW // SECOND + 60)
        assert machine.clock().catch_up(61 * SECOND) == done("rtc", 61 * SECOND)
        assert machine.set_to == [NOW + 61 * SECOND]

    def test_one_that_was_behind_its_rtc_before_stays_so(self, machine: Machine) -> None:
        # An RTC that tells a local time, perhaps.
        machine.add_rtc(NOW // SECOND + 3600 + 60)
        assert machine.clock().catch_up(60 * SECOND) == done("rtc", 60 * SECOND)

    def test_one_that_somebody_has_set_since_is_left_alone(self, machine: Machine) -> None:
        machine.add_rtc(NOW // SECOND)
        assert machine.clock().catch_up(60 * SECOND) == done(None)
        assert machine.set_to == []

    def test_a_time_before_the_image_was_made_is_nobodys(self, machine: Machine) -> None:
        machine.add_rtc(100)
        refused = machine.clock().catch_up(60 * SECOND)
        assert (refused.ok, refused.step_ns) == (False, 0)
        assert machine.set_to == []


class TestAtBoot:
    def test_the_launchers_time_counts_from_the_launch(self, machine: Machine) -> None:
        machine.now = 7 * SECOND  # since 1970: a kernel that has read no RTC
        step = machine.clock().set_at_boot(NOW, uptime_s=2.5)
        assert step == done("launcher", NOW + 2_500_000_000 - 7 * SECOND)
        assert machine.set_to == [NOW + 2_500_000_000]

    def test_it_sets_no_clock_back(self, machine: Machine) -> None:
        # As for an agent that is started again: by then others may have set it better.
        assert machine.clock().set_at_boot(NOW - 60 * SECOND, uptime_s=9000) == done(None)
        assert machine.set_to == []

    def test_an_rtc_that_the_kernel_has_read_is_better(self, machine: Machine) -> None:
        machine.add_rtc(NOW // SECOND)
        assert machine.clock().set_at_boot(NOW + 60 * SECOND, uptime_s=1) == done(None)
        assert machine.set_to == []

    def test_an_rtc_that_the_kernel_has_not_read_is_not(self, machine: Machine) -> None:
        machine.add_rtc(NOW // SECOND, hctosys=0)
        step = machine.clock().set_at_boot(NOW + 60 * SECOND, uptime_s=1)
        assert step == done("launcher", 61 * SECOND)

    def test_an_rtc_that_nobody_has_set_is_not_either(self, machine: Machine) -> None:
        machine.add_rtc(100)
        machine.now = 100 * SECOND
        step = machine.clock().set_at_boot(NOW, uptime_s=1)
        assert step == done("launcher", NOW - 99 * SECOND)
        assert machine.set_to == [NOW + SECOND]

    def test_a_clock_without_a_time_begins_when_the_image_was_made(self, machine: Machine) -> None:
        machine.add_rtc(100)
        machine.now = 100 * SECOND
        # 5: nor is that a time.
        assert machine.clock().set_at_boot(5, 1) == done("image", MADE - 100 * SECOND)
        assert machine.set_to == [MADE]
