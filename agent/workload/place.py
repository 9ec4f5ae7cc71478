"""Where commands of the workload protocol run: in the VM itself, or in a container that stays."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import attrs
import trio

from agent.errors import failing_as
from agent.processes.cgroup import Cgroup
from agent.processes.command import Command
from agent.processes.process import Process, Stdio
from agent.processes.service import Processes
from agent.workload.keeper import Keeper
from protocol.errors import ErrorCode


@attrs.frozen
class Words:
    """A command as a host gives it; ``env`` may hold secrets."""

    argv: Sequence[str]
    env: Sequence[tuple[str, str]] = attrs.field(default=(), repr=False)
    workdir: str | None = None


@attrs.frozen
class Group:
    """Whom a signal for a command is meant for, and what there is to be killed."""

    leader: int
    """The command's pid, as the VM sees it: the first of its process group."""
    cgroup: Cgroup | None
    in_container: bool
    """Whether the command has pids of its own, apart from those of who started it for us."""


@attrs.frozen
class Started:
    """A command that runs: the process that the agent waits for, and whom it is about."""

    process: Process
    group: Group


Record = Callable[[Process], None]
"""Puts down that there is a process, for the next agent; nothing is executed by it before that."""


class Place(Protocol):
    """One of two: ``Machine`` here, or a container, which takes the whole agent to make."""

    async def ready(self) -> None:
        """Return once commands can run. Raises AgentError: they never will."""

    def running(self, words: Words, *, terminal: bool) -> AbstractAsyncContextManager[Started]:
        """A command for the block, with no input, that leaves its output to be read.

        Left before the command has ended, or cancelled, the block ends with its whole tree dead.

        Raises:
            AgentError: it cannot be started; INVALID_REQUEST where it is no command.
        """

    @property
    def in_container(self) -> bool:
        """What ``Group`` has to say of its commands."""

    async def start_kept(
        self, words: Words, stdio: Stdio, keeper: Keeper, record: Record
    ) -> Started:
        """A command that outlives its connection and the agent; the caller waits for its end.

        stdin, a pipe, is for its keeper.

        Raises:
            AgentError: as ``running``.
        """


@attrs.frozen
class Machine:
    """The VM itself, as root."""

    processes: Processes
    in_container: bool = False

    async def ready(self) -> None:
        """At once."""

    @asynccontextmanager
    async def running(self, words: Words, *, terminal: bool) -> AsyncIterator[Started]:
        async with self.processes.running(_command(words), Stdio(terminal=terminal)) as process:
            # Each process is the first of a session, and so of a process group.
            yield Started(process, Group(process.pid, process.cgroup, in_container=False))

    async def start_kept(
        self, words: Words, stdio: Stdio, keeper: Keeper, record: Record
    ) -> Started:
        command = await trio.to_thread.run_sync(keeper.keeping_first, _command(words))
        with failing_as(ErrorCode.SPAWN_FAILED, f"start {words.argv[0]}"), keeper.told_pid() as pid:
            process, leader = await self.processes.start_kept(
                command, stdio, record=record, pid_of=pid
            )
        return Started(process, Group(leader, process.cgroup, in_container=False))


def _command(words: Words) -> Command:
    return Command.from_request(words.argv, words.env, words.workdir)
