"""A shell beside the workload that outlives the agent, and keeps its exit status for the next.

    <run>/begun         there from just before the command is executed
          status        its exit code, once it has ended
          start/pid     a FIFO, for the command's pid; where crun starts it, its files besides

An agent that was killed is no longer the parent of what it started, and nobody tells its successor
how that ended. So the shell is the parent. It executes nothing before it is let, and ends when that
can no longer be: whatever the agent has put down by then, its command runs once or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError
from agent.processes.cgroup import Cgroup
from agent.processes.command import Command
from agent.processes.executable import find_executable, unrunnable
from agent.processes.process import Process
from protocol.errors import ErrorCode

_SHELL = "/bin/sh"

# On its stdin it is let begin; an agent that dies before leaves it the end of that. It keeps the
# FIFO open, so that nobody waits there for an agent. What the shell itself has to say of the
# command's end is nobody's output; so the command has its stderr by a subshell, since a command's
# redirections hold for the shell that waits for it, too. SIGTERM comes to all that is in a cgroup;
# a trap, unlike a signal that is ignored, is not inherited.
_SCRIPT = """\
trap : TERM
run=$1
shift
exec 3>&2 2>/dev/null 4<>"$run/start/pid"
read -r go || exit
echo >"$run/begun"
(exec "$@" </dev/null 2>&3 3>&- 4>&-)
code=$?
echo "$code" >"$run/status"
exit "$code"
"""
# In a session of its own, so that signals for the command's process group are for that alone; the
# number that is told is the command's own, and what a shell adds to the environment is not.
_FIRST = 'echo "$$" >"$1/start/pid"; shift; unset SHLVL PWD OLDPWD; exec "$@"'

_PID_BYTES = 32

# linux/sched.h: among the flags of /proc/<pid>/stat.
_PF_EXITING = 0x4


@attrs.frozen
class Keeper:
    """Makes the command that keeps another, and finds what it kept, in a directory of one run."""

    directory: Path

    @classmethod
    def new(cls, parent: Path) -> Keeper:
        """One for a new run. Blocks; raises OSError."""
        keeper = cls(parent / os.urandom(8).hex())
        keeper.directory.mkdir(parents=True, mode=0o700)
        return keeper

    @property
    def start(self) -> Path:
        """For whoever starts the command: a directory that is to be made, with the FIFO in it."""
        return self.directory / "start"

    def keeping(self, command: Command) -> Command:
        """The command that runs ``command`` when it is ``let``, and writes down its exit code.

        That is 128+n after signal n.

        Raises:
            AgentError: SPAWN_FAILED, where there is nothing to execute.
        """
        # By its path: to the shell a name could mean one of its own commands.
        path = find_executable(command)
        return self._kept(command, (path, *command.argv[1:]))

    def keeping_first(self, command: Command) -> Command:
        """The same for one that is to be the first of a process group, and tells its pid.

        Raises:
            AgentError: SPAWN_FAILED, where there is nothing to execute, or no way to.
        """
        path = find_executable(command)
        refusal = unrunnable(command.argv, command.environment, command.directory, _opened)
        if refusal is not None:
            raise AgentError(ErrorCode.SPAWN_FAILED, f"start {command.argv[0]}: {refusal}")
        first = ("setsid", _SHELL, "-c", _FIRST, "sh", str(self.directory))
        return self._kept(command, (*first, path, *command.argv[1:]))

    def _kept(self, command: Command, words: tuple[str, ...]) -> Command:
        argv = (_SHELL, "-c", _SCRIPT, "sh", str(self.directory), *words)
        return attrs.evolve(command, argv=argv)

    @contextmanager
    def told_pid(self) -> Iterator[Callable[[Process], Awaitable[int]]]:
        """What lets the one command of ``keeping_first`` that is started in the block, for its pid.

        It raises AgentError, SPAWN_FAILED, where that ended before.
        """
        self.start.mkdir(mode=0o700)
        os.mkfifo(self._fifo, 0o600)
        with self._opened_fifo() as fifo:

            async def pid_of(process: Process) -> int:
                await let(process)
                async with trio.open_nursery() as nursery:

                    async def watch() -> None:
                        await process.wait()
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(watch)
                    await trio.lowlevel.wait_readable(fifo)
                    nursery.cancel_scope.cancel()
                leader = _read_pid(fifo)
                if leader is None:
                    raise AgentError(ErrorCode.SPAWN_FAILED, "the command's shell ended before it")
                return leader

            yield pid_of

    async def find_pid(
        self, shell: int, ticks: int, cgroup: Cgroup | None, *, in_container: bool
    ) -> int | None:
        """The command's pid, for an agent that was not told it; None where there will be none.

        It is told once: whoever was told it died with it, or it is still to come. Raises OSError.
        """
        found = None if cgroup is None else _first_of(cgroup, shell, in_container=in_container)
        if found is not None:
            return found
        with self._opened_fifo() as fifo:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    await ended(shell, ticks)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                await trio.lowlevel.wait_readable(fifo)
                nursery.cancel_scope.cancel()
            return _read_pid(fifo)

    def has_begun(self) -> bool:
        """Whether the command was let, and executed if that was possible. Blocks."""
        return (self.directory / "begun").exists()

    def kept_code(self) -> int | None:
        """The exit code that was written; None where nobody was left to write one. Blocks."""
        with suppress(OSError, ValueError):
            return int((self.directory / "status").read_text(encoding="ascii"))
        return None

    def clear(self) -> None:
        """Before another attempt: nothing is kept yet. Blocks; raises OSError."""
        self.remove()
        self.directory.mkdir(mode=0o700)

    def remove(self) -> None:
        """Its run is over, and what was kept of it known. Blocks."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _fifo(self) -> Path:
        return self.start / "pid"

    @contextmanager
    def _opened_fifo(self) -> Iterator[int]:
        fifo = os.open(self._fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield fifo
        finally:
            os.close(fifo)


async def let(process: Process) -> None:
    """Have the shell of a ``Keeper`` begin with its command."""
    assert process.stdin is not None
    await process.stdin.send(b"\n")
    await process.stdin.end()


def _read_pid(fifo: int) -> int | None:
    with suppress(BlockingIOError, ValueError):
        return int(os.read(fifo, _PID_BYTES))
    return None


def _first_of(cgroup: Cgroup, shell: int, *, in_container: bool) -> int | None:
    """The first process of a command: the shell's child, or the oldest that is in a container."""
    ours = pid_namespace(os.getpid())
    found = []
    for pid in cgroup.pids():
        with suppress(OSError):
            is_commands = pid_namespace(pid) != ours if in_container else _parent(pid) == shell
            ticks = start_ticks(pid)
            if is_commands and ticks is not None:
                found.append((ticks, pid))
    return min(found)[1] if found else None


def pid_namespace(pid: int) -> int:
    """The number of a process's pid namespace (namespaces(7)); raises OSError: it has ended."""
    return Path(f"/proc/{pid}/ns/pid").stat().st_ino


def _parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return int(stat.rpartition(")")[2].split()[1])


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
