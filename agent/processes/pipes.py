"""The agent's ends of a command's pipes.

The command's end of an output pipe is open for reading too. An agent that is killed takes its own
end along, and whatever a command left running would die of SIGPIPE at its next line; so it waits,
at most for the next agent, which opens the pipe anew (`adopt`). Its end is still an end: none is
seen while a process that has the pipe lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path

import trio

# What the kernel gives a pipe at first (pipe(7)), so the most that one read of it can take.
PIPE_BYTES = 64 * 1024
# What a command that fills that gets: fewer switches between it and the agent.
LARGE_PIPE_BYTES = 1024 * 1024


class _PipeEnd:
    def __init__(self, descriptor: int) -> None:
        """Takes ``descriptor`` over."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self.capacity_bytes = PIPE_BYTES
        """What can lie in it unread, at most."""

    @property
    def is_open(self) -> bool:
        """Whether bytes can still pass: it closes itself where it is clear that none will."""
        return self._descriptor >= 0

    def close(self) -> None:
        """Close it, once or again."""
        if self.is_open:
            trio.lowlevel.notify_closing(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _grow(self) -> None:
        self.capacity_bytes = LARGE_PIPE_BYTES
        # An unprivileged agent has a limit; each read or write then takes what the pipe does.
        with suppress(OSError):
            fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, LARGE_PIPE_BYTES)


class OutputPipe(_PipeEnd):
    """The reading end of a command's stdout or stderr, or of its terminal; for one task."""

    def read(self, most_bytes: int = PIPE_BYTES) -> bytes | None:
        """What is there, at most ``most_bytes``; None for nothing yet, no bytes for the end."""
        if not self.is_open:
            return b""
        try:
            data = os.read(self._descriptor, most_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            # A terminal whose last process has closed it says so by an error (ioctl_tty(2)).
            if error.errno != errno.EIO:
                raise
            data = b""
        if not data:
            self.close()
        elif len(data) == PIPE_BYTES == self.capacity_bytes:
            self._grow()
        return data

    def move(self, file: int, most_bytes: int) -> int | None:
        """Move what is there to a file's offset: how much it was, None for nothing yet, 0 for the
        end. Whoever is killed meanwhile has lost nothing (splice(2)). Raises OSError."""
        try:
            moved = os.splice(self._descriptor, file, most_bytes, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            return None
        if moved >= PIPE_BYTES == self.capacity_bytes:
            self._grow()
        return moved

    async def readable(self) -> None:
        """Wait until ``read`` has something to say."""
        if self.is_open:
            await trio.lowlevel.wait_readable(self._descriptor)

    async def receive(self, most_bytes: int = PIPE_BYTES) -> bytes:
        """The next bytes; none when no process holds the other end any more."""
        while (data := self.read(most_bytes)) is None:
            await self.readable()
        await trio.lowlevel.checkpoint()
        return data


class InputPipe(_PipeEnd):
    """The writing end of a command's stdin; for one task."""

    async def send(self, data: bytes) -> None:
        """Write all of ``data``, as fast as the command takes it.

        What a command does not read is dropped once nobody can read it any more: not reading all
        of its input is its right, as in a shell's pipe.
        """
        left = memoryview(data)
        while left and self.is_open:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                if self.capacity_bytes == PIPE_BYTES:
                    self._grow()
                    continue
                await trio.lowlevel.wait_writable(self._descriptor)
            except BrokenPipeError:
                self.close()
        await trio.lowlevel.checkpoint()

    async def end(self) -> None:
        """Tell the command that there is no more."""
        self.close()


def output_pipe(ours: ExitStack, theirs: ExitStack) -> tuple[int, int]:
    """A pipe whose ends close with two stacks; the descriptors to read from, and for a command."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    ours.callback(os.close, reading)
    try:
        both = os.open(f"/proc/self/fd/{writing}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(writing)
    theirs.callback(os.close, both)
    return reading, both


def input_pipe(ours: ExitStack, theirs: ExitStack) -> tuple[int, int]:
    """A pipe whose ends close with two stacks; the descriptors to write to, and for a command."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    theirs.callback(os.close, reading)
    ours.callback(os.close, writing)
    return writing, reading


def adopt(pids: list[int]) -> list[OutputPipe]:
    """The pipes that processes have as stdout and stderr, each once: an earlier agent's.

    Processes that have ended meanwhile are passed over.
    """
    found: dict[str, OutputPipe] = {}
    for pid in pids:
        for number in (1, 2):
            path = Path(f"/proc/{pid}/fd/{number}")
            try:
                name = str(path.readlink())
                if name.startswith("pipe:") and name not in found:
                    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                    found[name] = OutputPipe(os.open(path, flags))
            except OSError:
                continue
    return list(found.values())
