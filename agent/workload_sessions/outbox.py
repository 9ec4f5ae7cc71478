"""What a command has written and its peer has not had yet: bounded, the oldest going first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs
import trio

from agent.processes.process import Stream
from protocol import GuestMessage, workload

STREAM_BYTES = 1024 * 1024
"""Of each stream's output, at most, with what keeping it takes."""

_MESSAGES: dict[Stream, type[workload.Stdout] | type[workload.Stderr]] = {
    Stream.STDOUT: workload.Stdout,
    Stream.STDERR: workload.Stderr,
}
# What a chunk takes besides its bytes; so single bytes cannot take a hundred times their size.
_CHUNK_OVERHEAD_BYTES = 128
# Those that are smaller than a part are joined, up to a whole, and then take what they have.
_PART_BYTES = 16 * 1024
_WHOLE_BYTES = 64 * 1024


def output(request_id: int, stream: Stream, data: bytes, *, truncated: bool) -> GuestMessage:
    """A chunk of output as a message."""
    return _MESSAGES[stream](request_id, data, truncated)


@attrs.define(eq=False)
class _Chunk:
    number: int
    data: bytes | bytearray

    @property
    def cost_bytes(self) -> int:
        return len(self.data) + _CHUNK_OVERHEAD_BYTES


@attrs.define(eq=False)
class _Held:
    """One stream's part."""

    chunks: deque[_Chunk] = attrs.field(factory=deque)
    cost_bytes: int = 0
    lost: bool = False
    """Whether something before the first chunk was dropped."""


@attrs.define(eq=False)
class Outbox:
    """Output of one command, to be taken as messages in the order of its arrival, then its end."""

    request_id: int
    _forget: Callable[[], None]
    """To be called when its end is taken."""
    _held: dict[Stream, _Held] = attrs.field(factory=lambda: {each: _Held() for each in Stream})
    _newest: int = 0
    _end: workload.Exit | None = None
    taken: trio.Event = attrs.field(factory=trio.Event)
    """Comes with the next message that is taken, and is another one then."""

    def put(self, stream: Stream, data: bytes) -> None:
        """Add output, at most 64 KiB; where that is too much, the oldest of its stream goes."""
        held = self._held[stream]
        last = held.chunks[-1] if held.chunks else None
        if (
            last is not None
            and last.number == self._newest
            and isinstance(last.data, bytearray)
            and len(last.data) + len(data) <= _WHOLE_BYTES
        ):
            last.data += data
            held.cost_bytes += len(data)
            if len(last.data) > _WHOLE_BYTES - _PART_BYTES:
                # What is still to grow has an eighth more than it needs.
                last.data = bytes(last.data)
        else:
            self._newest += 1
            chunk = _Chunk(self._newest, data if len(data) > _PART_BYTES else bytearray(data))
            held.chunks.append(chunk)
            held.cost_bytes += chunk.cost_bytes
        while held.cost_bytes > STREAM_BYTES:
            held.cost_bytes -= held.chunks.popleft().cost_bytes
            held.lost = True

    def is_full(self, stream: Stream) -> bool:
        """Whether another chunk might make an older one go."""
        return self._held[stream].cost_bytes > STREAM_BYTES - 64 * 1024 - _CHUNK_OVERHEAD_BYTES

    def end(self, exit_message: workload.Exit) -> None:
        """There will be no more; this is what comes after the last of it."""
        self._end = exit_message

    @property
    def has_ended(self) -> bool:
        return self._end is not None

    def take(self) -> GuestMessage | None:
        """The next message; None: there is none at the moment."""
        if self.taken.statistics().tasks_waiting:
            self.taken.set()
            self.taken = trio.Event()
        waiting = [stream for stream in Stream if self._held[stream].chunks]
        if not waiting:
            end, self._end = self._end, None
            if end is not None:
                self._forget()
            return end
        stream = min(waiting, key=lambda each: self._held[each].chunks[0].number)
        held = self._held[stream]
        chunk = held.chunks.popleft()
        held.cost_bytes -= chunk.cost_bytes
        lost, held.lost = held.lost, False
        return output(self.request_id, stream, bytes(chunk.data), truncated=lost)
