"""The requests that are under way, and their end when the machine is to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import trio

from agent.errors import AgentError
from protocol import requests
from protocol.errors import ErrorCode

# A command's end is told by its own answer, once its processes have been ended.
_END_WITH_THEIR_PROCESSES = frozenset({requests.VmExec, requests.Run})
# Until their last output has been collected, and until all else has put away what it had open.
_TOLD_S = 0.3
_PUT_AWAY_S = 1.0


@attrs.define(eq=False)
class Work:
    """What a shutdown must not leave with a file of the storage open."""

    is_stopping: bool = False
    """Whether a shutdown has begun: nothing new is started."""
    _under_way: dict[trio.CancelScope, type] = attrs.field(factory=dict)
    _ended: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    def refusal(self) -> AgentError:
        """What they are told that come too late, and those that are cut off."""
        return AgentError(ErrorCode.INVALID_REQUEST, "the agent is shutting down")

    @contextmanager
    def under_way(self, kind: type) -> Iterator[trio.CancelScope]:
        """A scope for one request, which a shutdown cancels, its own excepted."""
        with trio.CancelScope() as scope:
            if kind is not requests.Shutdown:
                self._under_way[scope] = kind
            try:
                yield scope
            finally:
                self._under_way.pop(scope, None)
                self._ended.unpark_all()

    def stop(self) -> None:
        """Refuse what is new, and cancel all but commands, whose processes are ended first."""
        self.is_stopping = True
        for scope, kind in self._under_way.items():
            if kind not in _END_WITH_THEIR_PROCESSES:
                scope.cancel()

    async def ended(self) -> None:
        """Return when all has ended, or has had the time to; the processes have."""
        for patience_s in (_TOLD_S, _PUT_AWAY_S):
            with trio.move_on_after(patience_s):
                while self._under_way:
                    await self._ended.park()
            # What is left are commands whose hosts do not hear them out.
            for scope in self._under_way:
                scope.cancel()
