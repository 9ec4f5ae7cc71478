"""The agent's ends of a command's pipes."""

from __future__ import annotations

import fcntl
import os

import trio

# What the kernel gives a pipe at first (pipe(7)), so the most that one read of it can take.
_PIPE_BYTES = 64 * 1024
# What a command that fills that gets: fewer switches between it and the agent.
_LARGE_PIPE_BYTES = 1024 * 1024


class OutputPipe:
    """The reading end of a command's stdout or stderr; one task reads it at a time."""

    def __init__(self, descriptor: int) -> None:
        """Takes ``descriptor`` over."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._read_bytes = _PIPE_BYTES

    @property
    def is_open(self) -> bool:
        """Whether more may come; a pipe is closed where its end is read."""
        return self._descriptor >= 0

    async def receive(self) -> bytes:
        """The next bytes, at most 1 MiB; none when no process holds the other end any more.

        Cancelling it loses nothing.
        """
        await trio.lowlevel.checkpoint()
        while self.is_open:
            try:
                data = os.read(self._descriptor, self._read_bytes)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._descriptor)
                continue
            if not data:
                self.close()
            elif len(data) == _PIPE_BYTES == self._read_bytes:
                self._grow()
            return data
        return b""

    def close(self) -> None:
        """Close it, once or again; the command gets SIGPIPE for what it still writes."""
        if self.is_open:
            trio.lowlevel.notify_closing(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _grow(self) -> None:
        self._read_bytes = _LARGE_PIPE_BYTES
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, _LARGE_PIPE_BYTES)
        except OSError:
            return  # an unprivileged agent has a limit; reads then bring what there is
