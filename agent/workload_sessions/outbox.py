"""What a command has written and its peer has not had yet: bounded, the oldest going first."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import trio

from agent.processes.pipes import PIPE_BYTES
from agent.processes.process import Stream
from agent.workload_sessions.ring import HEADER_BYTES, Ring
from protocol import GuestMessage, workload

STREAM_BYTES = 1024 * 1024
"""Of each stream's output, at most, with what keeping it takes."""

_MESSAGES: dict[Stream, type[workload.Stdout] | type[workload.Stderr]] = {
    Stream.STDOUT: workload.Stdout,
    Stream.STDERR: workload.Stderr,
}
_CHUNK_BYTES = PIPE_BYTES
# A command with its process, tasks and pipes takes some 75 KB besides, and the agent 32 MB.
_RING_BYTES = STREAM_BYTES - 96 * 1024


def output(request_id: int, stream: Stream, data: bytes, *, truncated: bool) -> GuestMessage:
    """A chunk of output as a message."""
    return _MESSAGES[stream](request_id, data, truncated)


@attrs.define(eq=False)
class Outbox:
    """Output of one command, to be taken as messages in the order of its arrival, then its end.

    ``close`` gives back the memory of what nobody will take; with its end that is done.
    """

    request_id: int
    _forget: Callable[[], None]
    """To be called when its end is taken."""
    _rings: dict[Stream, Ring] = attrs.field(
        factory=lambda: {each: Ring(_RING_BYTES) for each in Stream}
    )
    _lost: set[Stream] = attrs.field(factory=set)
    """Those of which something before the first piece was dropped."""
    _newest: int = 0
    _end: workload.Exit | None = None
    _moved: trio.Event = attrs.field(factory=trio.Event)

    def put(self, stream: Stream, data: bytes) -> None:
        """Add output, at most 64 KiB; where that is too much, the oldest of its stream goes."""
        ring = self._rings[stream]
        number, length = ring.newest() if ring.held_bytes else (0, 0)
        if number == self._newest and 0 < length <= _CHUNK_BYTES - len(data):
            lost = ring.extend(data)
        else:
            self._newest += 1
            lost = ring.put(self._newest, data)
        if lost:
            self._lost.add(stream)

    def is_full(self, stream: Stream) -> bool:
        """Whether another chunk might make an older one go."""
        return self._rings[stream].held_bytes > _RING_BYTES - _CHUNK_BYTES - HEADER_BYTES

    def end(self, exit_message: workload.Exit) -> None:
        """There will be no more; this is what comes after the last of it."""
        self._end = exit_message

    @property
    def has_ended(self) -> bool:
        return self._end is not None

    @property
    def left_bytes(self) -> int:
        return sum(ring.held_bytes for ring in self._rings.values())

    async def moved(self) -> None:
        """Return when a message is taken, or when ``move`` says that none will be."""
        await self._moved.wait()

    def move(self) -> None:
        """Have those who wait look again."""
        if self._moved.statistics().tasks_waiting:
            self._moved.set()
            self._moved = trio.Event()

    def take(self) -> GuestMessage | None:
        """The next message; None: there is none at the moment."""
        self.move()
        waiting = [stream for stream in Stream if self._rings[stream].held_bytes]
        if not waiting:
            end, self._end = self._end, None
            if end is not None:
                self.close()
                self._forget()
            return end
        stream = min(waiting, key=lambda each: self._rings[each].first_number)
        lost = stream in self._lost
        self._lost.discard(stream)
        return output(self.request_id, stream, self._rings[stream].take(), truncated=lost)

    def close(self) -> None:
        """Drop what is left."""
        for ring in self._rings.values():
            ring.close()
