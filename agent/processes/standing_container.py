"""A container that stays: one that runs, and what the next agent has to know of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import attrs
import orjson
import trio

from agent.processes.cgroup import Cgroup
from agent.processes.command import Bind
from agent.processes.container import ContainerRuntime

# The cgroup of its first process, among those of the commands that joined it.
FIRST = "first"

# linux/sched.h: among the flags of /proc/<pid>/stat.
_PF_EXITING = 0x4

_RECORD = "container.json"


@attrs.define(eq=False)
class StandingContainer:
    """One that runs, as far as its ``ended`` is not set."""

    workload: str
    pid: int
    """Of its first process, as the VM sees it."""
    ticks: int
    """When that started, which tells it from a later one of that number."""
    has_own_init: bool
    """Whether its first process is the agent's, and not a workload's."""
    directory: Path
    cgroup: Cgroup
    binds: dict[str, Bind]
    """What was mounted into it at requests' wishes, by where it is."""
    _pidfd: int
    _commands: int = 0
    """That are running in the foreground, or about to."""
    _nobody_in: trio.Event = attrs.field(factory=trio.Event)
    ended: trio.Event = attrs.field(factory=trio.Event)

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def has_ended(self) -> bool:
        """Whether its first process has ended, or is about to: then it cannot be joined."""
        return self.ticks < 0 or start_ticks(self.pid) != self.ticks

    def is_idle(self) -> bool:
        """Whether it holds nothing but the agent's own init."""
        if not self.has_own_init or self._commands:
            return False
        # crun leaves the start to a child of its own, which may end a little after itself.
        crun = _parent(self.pid)
        try:
            return all(
                set(cgroup.pids()) - {crun} == {self.pid}
                if cgroup.path.name == FIRST
                else not cgroup.is_populated()
                for cgroup in Cgroup.all_in(self.cgroup.path)
            )
        except FileNotFoundError:  # it has ended, and its cgroup went with it
            return False

    def enter(self) -> None:
        """A command is about to run in it; ``leave`` when it has ended, or will not."""
        self._commands += 1

    def leave(self) -> None:
        """The end of what ``enter`` began."""
        self._commands -= 1
        if not self._commands:
            self._nobody_in.set()
            self._nobody_in = trio.Event()

    async def left(self) -> None:
        """Return when no command runs in its foreground."""
        while self._commands:
            await self._nobody_in.wait()

    async def wait(self) -> None:
        """Return when its first process has ended, and the kernel has ended all others with it."""
        await trio.lowlevel.wait_readable(self._pidfd)

    def suspend(self) -> None:
        """Stop its first process, which then answers to nothing but SIGKILL."""
        with suppress(OSError):  # it has ended
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)

    def close(self) -> None:
        os.close(self._pidfd)


@attrs.frozen
class Record:
    """What the next agent has to know of a container; ``ticks`` tell its pid from a later one."""

    workload: str
    pid: int
    ticks: int
    is_ours: bool
    privileged: bool
    binds: Mapping[str, Bind]

    @classmethod
    def of(cls, container: StandingContainer) -> Record:
        privileged = container.cgroup.path.parent.name == "privileged"
        return cls(
            container.workload,
            container.pid,
            container.ticks,
            container.has_own_init,
            privileged,
            container.binds,
        )

    def write(self, directory: Path) -> None:
        """Keep it beside the bundle, whole or not at all. Blocks; raises OSError."""
        new = directory / f"{_RECORD}.new"
        new.write_bytes(orjson.dumps(attrs.asdict(self)))
        new.replace(directory / _RECORD)

    @classmethod
    def read(cls, directory: Path) -> Record:
        """Raises OSError, ValueError, TypeError or KeyError: there is none that is whole."""
        document = orjson.loads((directory / _RECORD).read_bytes())
        binds = {path: Bind(**bind) for path, bind in document.pop("binds").items()}
        return cls(**document, binds=binds)

    def container(self, directory: Path, cgroup: Cgroup) -> StandingContainer:
        """One that may have ended, too: that is seen to as any other end. Raises OSError."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            pidfd = os.eventfd(1)  # as readable as the other would be
        return StandingContainer(
            workload=self.workload,
            pid=self.pid,
            ticks=self.ticks,
            has_own_init=self.is_ours,
            directory=directory,
            cgroup=cgroup,
            binds=dict(self.binds),
            pidfd=pidfd,
        )


def taken_over(directory: Path, runtime: ContainerRuntime) -> StandingContainer | None:
    """The container of an earlier agent that a directory is of, if it still runs."""
    try:
        record = Record.read(directory)
        parent = runtime.cgroups(privileged=record.privileged)
        container = record.container(directory, Cgroup(parent / directory.name))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if start_ticks(record.pid) != record.ticks:
        container.close()
        return None
    return container


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks after boot (proc_pid_stat(5)); -1 if it has ended, or
    is about to: the first of a container first sees all others to their end."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return -1
    state, *fields = stat.rpartition(")")[2].split()
    return -1 if state in "ZX" or int(fields[5]) & _PF_EXITING else int(fields[18])


def _parent(pid: int) -> int | None:
    """Of which process a process is a child (proc_pid_stat(5)); None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])
