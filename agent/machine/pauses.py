"""How long the VM stood still: its own time stood with it, and the host's, in the RTC, went on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs

from agent.machine.clock import RTC

# The RTC tells whole seconds, both times; and a clock's rate may be wrong by so much.
_VAGUE_BY_S = 2.0
_WRONG_BY = 0.001


def _uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@attrs.define(eq=False)
class Pauses:
    """Compares how far the RTC has gone with how far the VM has, from one look to the next.

    Neither of the two is the clock, which anybody may have set meanwhile.
    """

    rtc: Path = RTC
    uptime_s: Callable[[], float] = _uptime_s
    _seen: tuple[int, float] | None = None
    """The RTC's seconds since 1970, and the VM's since its boot, at the last look."""

    def missed_s(self) -> float:
        """How many seconds the VM has stood still since the last look, 0 where it has not, or where
        nothing tells. Reading an RTC takes some 0.1 ms."""
        before, self._seen = self._seen, self._look()
        if before is None or self._seen is None:
            return 0.0
        went_on_s = self._seen[1] - before[1]
        missed_s = self._seen[0] - before[0] - went_on_s
        return missed_s if missed_s > _VAGUE_BY_S + went_on_s * _WRONG_BY else 0.0

    def _look(self) -> tuple[int, float] | None:
        with suppress(OSError, ValueError):
            return int((self.rtc / "since_epoch").read_text()), self.uptime_s()
        return None
