"""The commands that run: whom a signal reaches, and what a stop ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs
import trio

from agent.processes.process import kill_all
from agent.workload.keeper import pid_namespace
from agent.workload.place import Group

_LAST_SIGNAL = 64
_DEATH_S = 2


class InvalidSignal(ValueError):
    """A number that is no signal's; the text says which are."""


@attrs.define(eq=False)
class Running:
    """One command, from the wish to have it to its end. ``Commands.entered`` makes it."""

    stopped: bool = False
    """Whether a stop has reached it: what ends it then is that."""
    _group: Group | None = None
    _waiting: list[int] = attrs.field(factory=list)
    _begun: trio.Event = attrs.field(factory=trio.Event)
    _ended: trio.Event = attrs.field(factory=trio.Event)

    def started(self, group: Group) -> None:
        """It runs, and gets the signals that came for it before."""
        self._group = group
        self._begun.set()
        waiting, self._waiting = self._waiting, []
        for number in waiting:
            _signal_group(group, number)

    def signal(self, number: int) -> None:
        """Send a signal to its process group; nothing where that has ended just then.

        Raises:
            InvalidSignal: it is not one of 1 to 64.
        """
        if not 1 <= number <= _LAST_SIGNAL:
            raise InvalidSignal(f"{number} is no signal, expected 1 to {_LAST_SIGNAL}")
        if self._group is None:
            self._waiting.append(number)
        elif not self._ended.is_set():
            _signal_group(self._group, number)

    def ended(self) -> None:
        """It has ended, or was never started."""
        self._begun.set()
        self._ended.set()

    async def stop(self, patience: trio.CancelScope) -> None:
        """TERM to all of it, and KILL to what is left when ``patience`` ends."""
        self.stopped = True
        await self._begun.wait()
        if self._group is None:
            return
        _terminate(self._group)
        with patience:
            await self._ended.wait()
            if self._group.cgroup is not None:
                await self._group.cgroup.emptied()
        await self._kill(self._group)
        await self._ended.wait()

    async def _kill(self, group: Group) -> None:
        if group.cgroup is None:
            if not self._ended.is_set():
                _signal_group(group, signal.SIGKILL)
            return
        with trio.move_on_after(_DEATH_S):
            await kill_all(group.cgroup)


@attrs.define(eq=False)
class Commands:
    """All of them, of every connection, and the workload among them."""

    _running: list[Running] = attrs.field(factory=list)
    _patience: list[trio.CancelScope] = attrs.field(factory=list)
    is_stopping: bool = False
    """Whether a stop is under way: nothing is started then."""

    @contextmanager
    def entered(self) -> Iterator[Running]:
        """One command, for as long as it is wanted, runs, or is about to end."""
        running = Running()
        self._running.append(running)
        try:
            yield running
        finally:
            self._running.remove(running)
            running.ended()

    async def stop(self, timeout_s: float) -> None:
        """End all that run now; a later stop may shorten the time that they have.

        Returns when they have ended.
        """
        deadline = trio.current_time() + timeout_s
        if self.is_stopping:
            for scope in self._patience:
                scope.deadline = min(scope.deadline, deadline)
            return
        self.is_stopping = True
        try:
            async with trio.open_nursery() as nursery:
                for running in self._running:
                    self._patience.append(trio.CancelScope(deadline=deadline))
                    nursery.start_soon(running.stop, self._patience[-1])
        finally:
            self.is_stopping = False
            self._patience.clear()


def _signal_group(group: Group, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(os.getpgid(group.leader), number)


def _terminate(group: Group) -> None:
    """SIGTERM to all processes of a command, but not to those that started it in a container."""
    if group.cgroup is None:
        _signal_group(group, signal.SIGTERM)
        return
    if not group.in_container:
        group.cgroup.terminate()
        return
    ours = pid_namespace(os.getpid())
    for pid in group.cgroup.pids():
        with suppress(OSError):
            if pid_namespace(pid) != ours:
                os.kill(pid, signal.SIGTERM)
