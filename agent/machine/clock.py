"""The VM's clock, and where the host's time can be had.

By the fineness of what they tell: the hypervisor's PTP clock (ptp_kvm), a time that the host says
with a request, the RTC with its whole seconds.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from agent.errors import cause_of
from agent.linux import clock
from protocol.values import ClockStep

log = logging.getLogger(__name__)

PTP_CLASS = Path("/sys/class/ptp")
RTC = Path("/sys/class/rtc/rtc0")
DEVICES = Path("/dev")

# The kernel's names for what ptp_kvm, and arm64's own, make: "KVM virtual PTP".
_KVM = "KVM"
# Nobody is served by a clock that jumps by less; a host's message takes about as long.
WORTH_STEPPING_NS = 10_000_000
# The RTC tells whole seconds, and takes one to do so.
_RTC_IS_VAGUE_BY_NS = 2 * 10**9


@attrs.frozen
class _Told:
    """The host's time, less the VM's at the same moment."""

    source: str
    ahead_ns: int
    vague_by_ns: int = WORTH_STEPPING_NS


class NoTime(Exception):
    """A source that is there and tells no time that can be believed; the text says why."""


@attrs.frozen
class HostClock:
    """Compares the VM's clock with its host's, and steps it.

    ``not_before_ns`` is when the image was made: a time before that is nobody's. The calls that
    matter are given, so that a clock that is not ours is never set.
    """

    not_before_ns: int
    ptp_class: Path = PTP_CLASS
    rtc: Path = RTC
    devices: Path = DEVICES
    now_ns: Callable[[], int] = time.time_ns
    set_ns: Callable[[int], None] = clock.clock_settime
    ptp_precise: Callable[[int], tuple[int, int]] = clock.ptp_sys_offset_precise
    ptp_time: Callable[[int], int] = clock.clock_gettime

    def follow_ptp(self) -> ClockStep:
        """Step by the hypervisor's clock alone; a VM without one is left as it is."""
        return self._step([self._ptp])

    def follow_host(self, told_ns: int | None = None) -> ClockStep:
        """Step by whatever tells the host's time best; ``told_ns`` is what a request says."""
        return self._step([self._ptp, lambda: self._request(told_ns), self._rtc])

    def catch_up(self, missed_ns: int) -> ClockStep:
        """Step by what is there after a pause of that length, unless somebody has done so since:
        the clock is less than that behind the RTC then."""

        def rtc() -> _Told | None:
            told = self._rtc()
            if told is None or told.ahead_ns < missed_ns - _RTC_IS_VAGUE_BY_NS:
                return None
            # No further: who keeps the clock ahead of the RTC, or behind it, has a reason.
            return _Told("rtc", missed_ns)

        return self._step([self._ptp, rtc])

    def set_at_boot(self, launched_ns: int | None, uptime_s: float) -> ClockStep:
        """Step by what is there when the VM boots.

        The kernel has read the RTC itself by then. ``launched_ns`` is the host's time when it
        started the VM, ``uptime_s`` ago. It is the least that can be: who has it later, as an agent
        that was started again, does nothing about a clock that goes right.
        """

        def launched() -> _Told | None:
            now_ns = self.now_ns()
            if launched_ns is None or now_ns >= launched_ns:
                return None
            # By then the clock is the RTC's; unless nobody has ever set that.
            if self._kernel_read_rtc() and now_ns >= self.not_before_ns:
                return None
            self._believe("the launcher", launched_ns)
            return _Told("launcher", launched_ns + int(uptime_s * 1e9) - self.now_ns())

        def image() -> _Told | None:
            # Wrong, but certificates of the image's own time are valid then.
            behind_ns = self.not_before_ns - self.now_ns()
            return _Told("image", behind_ns) if behind_ns > 0 else None

        return self._step([self._ptp, launched, image])

    def _step(self, sources: list[Callable[[], _Told | None]]) -> ClockStep:
        problems = []
        for source in sources:
            try:
                told = source()
            except (NoTime, OSError, ValueError) as error:
                problems.append(cause_of(error))
                continue
            if told is not None:
                break
        else:
            said = "; ".join(problems) or None
            return ClockStep(ok=said is None, source=None, step_ns=0, error=said)
        if abs(told.ahead_ns) < told.vague_by_ns:
            return ClockStep(ok=True, source=told.source, step_ns=0)
        try:
            self.set_ns(self.now_ns() + told.ahead_ns)
        except (OSError, OverflowError) as error:
            failed = f"set the clock: {cause_of(error)}"
            return ClockStep(ok=False, source=told.source, step_ns=0, error=failed)
        return ClockStep(ok=True, source=told.source, step_ns=told.ahead_ns)

    def _ptp(self) -> _Told | None:
        name = self._kvm_ptp()
        if name is None:
            return None
        descriptor = os.open(self.devices / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                host_ns, own_ns = self.ptp_precise(descriptor)
            except OSError as error:
                log.debug("%s: no time of both at once: %s", name, cause_of(error))
                before_ns = self.now_ns()
                host_ns = self.ptp_time(descriptor)
                own_ns = (before_ns + self.now_ns()) // 2
        finally:
            os.close(descriptor)
        self._believe(name, host_ns)
        return _Told("ptp_kvm", host_ns - own_ns)

    def _kvm_ptp(self) -> str | None:
        """The device whose clock is the hypervisor's, if there is one."""
        for path in sorted(self.ptp_class.glob("ptp*")):
            if _KVM in (path / "clock_name").read_text():
                return path.name
        return None

    def _request(self, told_ns: int | None) -> _Told | None:
        if told_ns is None:
            return None
        self._believe("the request", told_ns)
        return _Told("request", told_ns - self.now_ns())

    def _rtc(self) -> _Told | None:
        path = self.rtc / "since_epoch"
        if not path.exists():
            return None
        # Read as one number, so as of the second's beginning or up to its end.
        host_ns = int(path.read_text()) * 10**9
        self._believe("the RTC", host_ns)
        return _Told("rtc", host_ns - self.now_ns(), _RTC_IS_VAGUE_BY_NS)

    def _kernel_read_rtc(self) -> bool:
        path = self.rtc / "hctosys"
        return path.exists() and path.read_text().strip() == "1"

    def _believe(self, who: str, time_ns: int) -> None:
        if time_ns < self.not_before_ns:
            seconds = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_ns // 10**9))
            raise NoTime(f"{who} says {seconds}, when this image had not been made")
