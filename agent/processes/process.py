"""A process that the agent started: its pid, its cgroup, its pipes, its end."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from contextlib import ExitStack
from enum import Enum
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError, failing_as
from agent.linux.confined_spawn import spawn_confined
from agent.linux.spawn import posix_spawn
from agent.processes.cgroup import Cgroup
from agent.processes.command import Command
from agent.processes.executable import explain_refusal, find_executable, loader_of
from agent.processes.oom_protection import OomProtection
from agent.processes.outcome import TIMED_OUT, Outcome
from agent.processes.pipes import InputPipe, OutputPipe, input_pipe, output_pipe
from agent.processes.terminal import Terminal, open_terminal
from protocol.errors import ErrorCode

_DEATH_S = 2


class Stream(Enum):
    """Where output came from; a terminal's is all stdout."""

    STDOUT = "stdout"
    STDERR = "stderr"


@attrs.frozen
class Stdio:
    """What a command's standard streams are: pipes, unless it has a terminal or a log."""

    takes_stdin: bool = False
    """Without a terminal: whether stdin is a pipe, rather than /dev/null."""
    terminal: bool = False
    log: Path | None = None
    """A FIFO, somewhere read, for stdout and stderr together."""
    error_log: Path | None = None
    """Another one for stderr, which then does not go to ``log``."""


@attrs.define(eq=False)
class Process:
    """A running command with all that it has started, or what is left of them.

    Whoever starts one awaits ``wait`` and calls ``close`` in the end.
    """

    pid: int
    """As the VM sees it; certain to be this process until ``wait`` has returned."""
    cgroup: Cgroup | None
    """Of its own; None where the machine has no cgroup2 to write to."""
    stdin: InputPipe | None
    """What it reads; None where that is /dev/null. A ``Terminal`` where it has one."""
    outputs: dict[Stream, OutputPipe]
    """What it writes, as far as the agent is to read it."""
    turns: trio.Semaphore
    """For reading that, which processes take in turns; see ``new_turns``."""
    _pidfd: int
    _started_at: float
    has_ended: bool = False
    """Whether it is known to have ended: ``wait`` will not have to."""
    _usage: resource.struct_rusage | None = None
    _signal: int | None = None
    _ended_at: float = 0
    exit_code: int | None = None
    """Set when it has ended: its status, or 128 plus the signal that ended it."""

    @property
    def terminal(self) -> Terminal | None:
        return self.stdin if isinstance(self.stdin, Terminal) else None

    @property
    def was_killed(self) -> bool:
        """Whether a signal has ended it."""
        return self._signal is not None

    def attach_terminal(self, terminal: Terminal) -> None:
        """Take a terminal over, in the place of what was its stdin and stdout."""
        if self.stdin is not None:
            self.stdin.close()
        self.stdin = terminal
        for pipe in self.outputs.values():
            pipe.close()
        self.outputs = {Stream.STDOUT: terminal.output}

    async def wait(self) -> int:
        """Its exit code, as soon as it has ended; for one task at a time."""
        if self.exit_code is None:
            if not self.has_ended:
                await trio.lowlevel.wait_readable(self._pidfd)
                self.has_ended = True
            self._reap()
        assert self.exit_code is not None
        return self.exit_code

    def wait_briefly(self, patience_ms: int) -> None:
        """Block until it has ended, but not for long."""
        ending = select.poll()
        ending.register(self._pidfd, select.POLLIN)
        self.has_ended = bool(ending.poll(patience_ms))

    def _reap(self) -> None:
        # Its pidfd says that it has ended, and until now it has been a zombie: the pid is its own.
        _, status, self._usage = os.wait4(self.pid, 0)
        self._ended_at = time.monotonic()
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            self._signal = -code
        self.exit_code = code if code >= 0 else 128 - code

    def outcome(self, *, timed_out: bool = False) -> Outcome:
        """What became of it; it has been waited for, and its cgroup is still there."""
        assert self.exit_code is not None
        assert self._usage is not None
        cpu_us = round((self._usage.ru_utime + self._usage.ru_stime) * 1e6)
        peak_memory_bytes = _peak_memory_bytes(self._usage)
        oom = False
        if self.cgroup is not None:
            counters = self.cgroup.counters()
            cpu_us = counters.cpu_us if counters.cpu_us is not None else cpu_us
            if counters.peak_memory_bytes is not None:
                peak_memory_bytes = counters.peak_memory_bytes
            oom = bool(counters.oom_kills)
        return Outcome(
            exit_code=TIMED_OUT if timed_out else self.exit_code,
            signal=None if timed_out else self._signal,
            timed_out=timed_out,
            oom=oom,
            duration_ms=round((self._ended_at - self._started_at) * 1000),
            cpu_us=cpu_us,
            peak_memory_bytes=peak_memory_bytes,
        )

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
                await kill_all(self.cgroup)

    def close_outputs(self) -> None:
        """Stop reading; for a process that has ended, or is about to."""
        for pipe in self.outputs.values():
            pipe.close()

    def close(self) -> None:
        """Let go of its descriptors. It has been waited for."""
        self.close_outputs()
        if self.stdin is not None:
            self.stdin.close()
        os.close(self._pidfd)


async def kill_all(cgroup: Cgroup) -> None:
    """Kill what is in a cgroup, and return when nothing is.

    Once in some ten thousand times a child is born that the kernel misses: its parent had begun to
    fork after the kill had, and was itself killed before the child was there
    (kernel/cgroup/cgroup.c, from cgroup_can_fork to cgroup_post_fork). So this asks again.
    """
    patience_s = 0.01
    while cgroup.is_populated():
        cgroup.kill()
        with trio.move_on_after(patience_s):
            await cgroup.emptied()
        patience_s *= 2


def _peak_memory_bytes(usage: resource.struct_rusage) -> int | None:
    """The largest resident size of one process; None where the agent's own covers it up.

    Until exec a process that posix_spawn makes shares the agent's memory, and getrusage(2) counts
    the size of that as the process's.
    """
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage.ru_maxrss * 1024 if usage.ru_maxrss > ours else None


def start_process(
    command: Command,
    stdio: Stdio,
    cgroup: Cgroup | None,
    turns: trio.Semaphore,
    protection: OomProtection,
) -> Process:
    """Start ``command`` in a cgroup of its own, which stays the caller's if this fails.

    For a worker thread: finding and executing a file takes as long as its file system does.
    ``protection`` is what it must not inherit of ours.

    Raises:
        AgentError: SPAWN_FAILED with the cause; nothing is left behind.
    """
    path = find_executable(command)
    doing = f"start {command.argv[0]}"
    with failing_as(ErrorCode.SPAWN_FAILED, doing), ExitStack() as ours, ExitStack() as theirs:
        stdin: int | None = None
        outputs: dict[Stream, int] = {}
        streams: tuple[int | None, int, int] | str
        if stdio.terminal:
            stdin, streams = open_terminal(ours, theirs)
        else:
            read = None
            if stdio.takes_stdin:
                stdin, read = input_pipe(ours, theirs)
            if stdio.log is not None:
                written = os.open(stdio.log, os.O_RDWR | os.O_CLOEXEC)
                theirs.callback(os.close, written)
                errors = written
                if stdio.error_log is not None:
                    errors = os.open(stdio.error_log, os.O_RDWR | os.O_CLOEXEC)
                    theirs.callback(os.close, errors)
                streams = (read, written, errors)
            else:
                outputs[Stream.STDOUT], stdout = output_pipe(ours, theirs)
                outputs[Stream.STDERR], stderr = output_pipe(ours, theirs)
                streams = (read, stdout, stderr)
        started_at = time.monotonic()
        pid = _spawn(command, path, streams, cgroup)
        ours.callback(os.waitpid, pid, 0)
        ours.callback(os.kill, pid, signal.SIGKILL)
        protection.unprotect(pid, cgroup)
        pidfd = os.pidfd_open(pid)
        ours.pop_all()
    terminal = Terminal(stdin) if stdio.terminal and stdin is not None else None
    if terminal is not None:
        pipes = {Stream.STDOUT: terminal.output}
    else:
        pipes = {stream: OutputPipe(descriptor) for stream, descriptor in outputs.items()}
    return Process(
        pid=pid,
        cgroup=cgroup,
        stdin=terminal or (InputPipe(stdin) if stdin is not None else None),
        outputs=pipes,
        turns=turns,
        pidfd=pidfd,
        started_at=started_at,
    )


def _spawn(
    command: Command,
    path: str,
    streams: tuple[int | None, int, int] | str,
    cgroup: Cgroup | None,
) -> int:
    confinement = command.confinement
    if confinement is not None:
        assert isinstance(streams, tuple)
        stdin, stdout, stderr = streams
        assert stdin is not None, "there is no /dev/null in there"
        program = os.path.realpath(path)
        return spawn_confined(
            program,
            loader_of(program),
            command.argv,
            command.environment,
            stdio=(stdin, stdout, stderr),
            cgroup=cgroup.path if cgroup is not None else None,
            **attrs.asdict(confinement),
        )

    def open_as_seen_by_it(file: str) -> int:
        seen = Path(command.directory, file)
        return os.open(seen, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    try:
        return posix_spawn(
            path,
            command.argv,
            command.environment,
            cwd=command.directory,
            stdio=streams,
            cgroup=cgroup.path if cgroup is not None else None,
        )
    except OSError as error:
        cause = explain_refusal(path, error.errno or 0, open_as_seen_by_it)
        raise AgentError(
            ErrorCode.SPAWN_FAILED, f"start {command.argv[0]}: {path}: {cause}"
        ) from error
