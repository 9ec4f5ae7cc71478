"""Reading a process's output to its end, and how long that may take after the process's own."""

from __future__ import annotations

import math
from collections import Counter

import attrs
import trio

from agent.processes.pipes import PIPE_BYTES, OutputPipe

# How long output may still come after the command's end, from what it left running. Hosts are
# promised 100 ms in all.
_PATIENCE_S = 0.08


# Chunks of output that are taken in one pass of the scheduler, of all commands together.
_CHUNKS_AT_ONCE = 4


def new_turns() -> trio.Semaphore:
    """What all drains of an agent share, so that many streams do not make each pass a long one.

    With 64 commands that write without end, everybody else waited for 64 chunks to be read,
    encoded and sent: 40 ms in the worst of a hundred cases. With four in a pass it is 7, and they
    stream as much.
    """
    return trio.Semaphore(_CHUNKS_AT_ONCE)


@attrs.define(eq=False)
class Drain:
    """Reads the pipes of one process, each for a task of its own.

    The process's end decides. What lay in a pipe then is read, however late and whoever is slow
    to take it; what others write who still have the pipe is waited for a moment only.
    """

    _turns: trio.Semaphore = attrs.field(factory=new_turns)
    _ends_at: float = math.inf
    _since_end_bytes: Counter[OutputPipe] = attrs.field(factory=Counter)
    _waiting: set[trio.CancelScope] = attrs.field(factory=set)

    def begin(self) -> None:
        """The process has ended."""
        self._ends_at = trio.current_time() + _PATIENCE_S
        for scope in self._waiting:
            scope.deadline = self._ends_at

    async def receive(self, pipe: OutputPipe) -> bytes:
        """The next bytes, at most 64 KiB; none when that was all."""
        while True:
            try:
                self._turns.acquire_nowait()
            except trio.WouldBlock:
                await self._turns.acquire()
            try:
                # While the process lives this is all that is done for most of its output.
                has_ended = self._ends_at < math.inf
                if has_ended and self._is_exhausted(pipe):
                    return b""
                data = pipe.read(PIPE_BYTES)
                if data is not None:
                    if has_ended:
                        self._since_end_bytes[pipe] += len(data)
                    # With the turn: it is this that puts the others off to the next pass.
                    await trio.lowlevel.checkpoint()
                    return data
            finally:
                self._turns.release()
            if self._is_over():
                return b""
            with trio.CancelScope(deadline=self._ends_at) as scope:
                self._waiting.add(scope)
                try:
                    await pipe.readable()
                finally:
                    self._waiting.discard(scope)

    def _is_exhausted(self, pipe: OutputPipe) -> bool:
        # Not more than fits into a pipe can have lain in it.
        return self._is_over() and self._since_end_bytes[pipe] >= pipe.capacity_bytes

    def _is_over(self) -> bool:
        return trio.current_time() >= self._ends_at
