"""A process that the agent started: its pid, its cgroup, its pipes, its end."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError, failing_as
from agent.linux.spawn import posix_spawn
from agent.processes.cgroup import Cgroup
from agent.processes.command import Command
from agent.processes.executable import explain_refusal, find_executable
from agent.processes.pipes import OutputPipe
from protocol.errors import ErrorCode

_DEATH_S = 2


@attrs.define(eq=False)
class Process:
    """A running command with all that it has started, or what is left of them.

    Whoever starts one awaits ``wait`` and calls ``close`` in the end.
    """

    pid: int
    """As the VM sees it; certain to be this process until ``wait`` has returned."""
    cgroup: Cgroup | None
    """Of its own; None where the machine has no cgroup2 to write to."""
    stdin: trio.lowlevel.FdStream | None
    """The writing end of its stdin; None where that is /dev/null."""
    stdout: OutputPipe
    stderr: OutputPipe
    _pidfd: int
    exit_code: int | None = None
    """Set when it has ended: its status, or 128 plus the signal that ended it."""

    async def wait(self) -> int:
        """Its exit code, as soon as it has ended; for one task at a time."""
        if self.exit_code is None:
            await trio.lowlevel.wait_readable(self._pidfd)
            self.exit_code = _reap(self._pidfd)
        return self.exit_code

    def kill_tree(self) -> None:
        """SIGKILL to it and to everything that it started, whatever session that is in.

        Without a cgroup: to its own session's first process group, while it has not ended.
        """
        if self.cgroup is not None:
            self.cgroup.kill()
        elif self.exit_code is None:
            os.killpg(self.pid, signal.SIGKILL)

    async def end_tree(self) -> None:
        """Kill the tree, and return when nothing is left of it: within milliseconds.

        Only a process that is stuck in the kernel takes longer, and is waited for 2 s.
        """
        self.kill_tree()
        with trio.move_on_after(_DEATH_S):
            await self.wait()
            if self.cgroup is not None:
                await self.cgroup.removed()

    def close(self) -> None:
        """Let go of its descriptors. It has been waited for."""
        self.stdout.close()
        self.stderr.close()
        if self.stdin is not None:
            self.stdin.close()
        os.close(self._pidfd)


def _reap(pidfd: int) -> int:
    """The exit code of a child that has ended, and its end as a zombie (waitid(2))."""
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert ended is not None  # that is for WNOHANG only
    return ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)


def start_process(command: Command, *, parent: Path | None, takes_stdin: bool) -> Process:
    """Start ``command`` in a new cgroup in ``parent``, with pipes for its output.

    For a worker thread: finding and executing a file takes as long as its file system does.

    Raises:
        AgentError: SPAWN_FAILED with the cause; nothing is left behind.
    """
    path = find_executable(command)
    with (
        failing_as(ErrorCode.SPAWN_FAILED, f"start {command.argv[0]}"),
        ExitStack() as undo,
        ExitStack() as theirs,
    ):
        cgroup = Cgroup.make(parent) if parent is not None else None
        if cgroup is not None:
            undo.callback(cgroup.remove)
        stdin, to_stdin = _pipe(theirs, undo) if takes_stdin else (None, None)
        from_stdout, stdout = _pipe(undo, theirs)
        from_stderr, stderr = _pipe(undo, theirs)
        pid = _spawn(command, path, stdin, stdout, stderr, cgroup)
        undo.callback(os.waitpid, pid, 0)
        undo.callback(os.kill, pid, signal.SIGKILL)
        pidfd = os.pidfd_open(pid)
        undo.pop_all()
    return Process(
        pid=pid,
        cgroup=cgroup,
        stdin=trio.lowlevel.FdStream(to_stdin) if to_stdin is not None else None,
        stdout=OutputPipe(from_stdout),
        stderr=OutputPipe(from_stderr),
        pidfd=pidfd,
    )


def _pipe(reader: ExitStack, writer: ExitStack) -> tuple[int, int]:
    """A pipe whose ends close with two stacks; the descriptors to read from and to write to."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    reader.callback(os.close, reading)
    writer.callback(os.close, writing)
    return reading, writing


def _spawn(
    command: Command,
    path: str,
    stdin: int | None,
    stdout: int,
    stderr: int,
    cgroup: Cgroup | None,
) -> int:
    def open_as_seen_by_it(file: str) -> int:
        seen = Path(command.directory, file)
        return os.open(seen, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    try:
        return posix_spawn(
            path,
            command.argv,
            command.environment,
            cwd=command.directory,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cgroup=cgroup.path if cgroup is not None else None,
        )
    except OSError as error:
        cause = explain_refusal(path, error.errno or 0, open_as_seen_by_it)
        raise AgentError(
            ErrorCode.SPAWN_FAILED, f"start {command.argv[0]}: {path}: {cause}"
        ) from error
