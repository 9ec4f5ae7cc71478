"""A shell beside the workload that outlives the agent, and keeps its exit status for the next.

An agent that was killed is no longer the parent of what it started, and nobody tells its successor
how that ended. So the shell is the parent.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError
from agent.processes.command import Command
from agent.processes.executable import find_executable, unrunnable
from agent.processes.process import Process
from protocol.errors import ErrorCode

_SHELL = "/bin/sh"

# What the shell itself has to say of the command's end is nobody's output. SIGTERM comes to all
# that is in a cgroup; a trap, unlike a signal that is ignored, is not inherited.
_SCRIPT = """\
trap : TERM
status=$1
shift
exec 3>&2 2>/dev/null
"$@" 2>&3 3>&-
code=$?
echo "$code" >"$status"
exit "$code"
"""
# In a session of its own, so that signals for the command's process group are for that alone; the
# number that is told is the command's own.
_FIRST = 'echo "$$" >"$1"; shift; exec "$@"'

_PID_BYTES = 32

# linux/sched.h: among the flags of /proc/<pid>/stat.
_PF_EXITING = 0x4


@attrs.frozen
class Keeper:
    """Makes the commands that keep others', and finds what they kept, in a directory."""

    directory: Path

    def keeping(self, command: Command) -> Command:
        """The command that runs ``command`` and writes down its exit code, 128+n after signal n.

        Raises:
            AgentError: SPAWN_FAILED, where there is nothing to execute.
        """
        # By its path: to the shell a name could mean one of its own commands.
        path = find_executable(command)
        words = (path, *command.argv[1:])
        argv = (_SHELL, "-c", _SCRIPT, "sh", str(self._status), *words)
        return attrs.evolve(command, argv=argv)

    def keeping_first(self, command: Command) -> Command:
        """The same for one that is to be the first of a process group, and tells its pid.

        Raises:
            AgentError: SPAWN_FAILED, where there is nothing to execute, or no way to.
        """
        path = find_executable(command)
        refusal = unrunnable(command.argv, command.environment, command.directory, _opened)
        if refusal is not None:
            raise AgentError(ErrorCode.SPAWN_FAILED, f"start {command.argv[0]}: {refusal}")
        first = ("setsid", _SHELL, "-c", _FIRST, "sh", str(self._fifo), path, *command.argv[1:])
        argv = (_SHELL, "-c", _SCRIPT, "sh", str(self._status), *first)
        return attrs.evolve(command, argv=argv)

    @contextmanager
    def told_pid(self) -> Iterator[Callable[[Process], Awaitable[int]]]:
        """What waits for the pid of the one command that ``keeping_first`` starts in the block.

        It raises AgentError, SPAWN_FAILED, where that ended before.
        """
        self._fifo.unlink(missing_ok=True)
        os.mkfifo(self._fifo, 0o600)
        fifo = os.open(self._fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

        async def pid_of(process: Process) -> int:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    await process.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                await trio.lowlevel.wait_readable(fifo)
                nursery.cancel_scope.cancel()
            with suppress(BlockingIOError, ValueError):
                return int(os.read(fifo, _PID_BYTES))
            raise AgentError(ErrorCode.SPAWN_FAILED, "the command's shell ended before it")

        try:
            yield pid_of
        finally:
            os.close(fifo)

    def forget(self) -> None:
        """Before a new one: what the last one kept goes. Blocks; raises OSError."""
        self._status.unlink(missing_ok=True)

    def kept_code(self) -> int | None:
        """The exit code that was written; None where nobody was left to write one. Blocks."""
        with suppress(OSError, ValueError):
            return int(self._status.read_text(encoding="ascii"))
        return None

    @property
    def _status(self) -> Path:
        return self.directory / "status"

    @property
    def _fifo(self) -> Path:
        return self.directory / "pid"


def _opened(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)


def start_ticks(pid: int) -> int | None:
    """When a process started, which tells it from a later one of its number (proc_pid_stat(5)).

    None if it has ended, or is about to.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" or int(fields[5]) & _PF_EXITING else int(fields[18])


async def ended(pid: int, ticks: int) -> None:
    """Return when a process that somebody else started has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_ticks(pid) == ticks:
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
