"""All that a connection is to be sent, by one task, in the order of its urgency."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

import attrs
import trio

from agent.connection import Connection
from agent.processes.process import Stream
from agent.workload_sessions.outbox import Outbox
from protocol import GuestMessage, encode

# Answers that wait for a peer; with more, its next message waits.
_MOST_ANSWERS = 64


class Source(Protocol):
    """Output to be taken as messages: a command's own, or the log's."""

    @property
    def has_ended(self) -> bool:
        """Whether all of it is there, its end included."""

    @property
    def left_bytes(self) -> int:
        """How much there is before its end; for one that has ended."""

    def take(self) -> GuestMessage | None:
        """The next message; None: there is none at the moment."""

    def close(self) -> None:
        """Nothing more is taken."""


@attrs.define(eq=False)
class Outgoing:
    """Answers go first, then what has ended, least output first, then the others' in turns.

    So no answer and no end waits for others' output, but where theirs is the shorter way to an end.
    """

    _connection: Connection
    _answers: deque[GuestMessage] = attrs.field(factory=deque)
    _ended: list[tuple[int, int, Source]] = attrs.field(factory=list)
    """A heap: by what is left, then by age."""
    _ending: set[Source] = attrs.field(factory=set)
    """Those in it."""
    _ages: count[int] = attrs.field(factory=count)
    _turns: deque[Source] = attrs.field(factory=deque)
    _queued: set[Source] = attrs.field(factory=set)
    _something: trio.Event = attrs.field(factory=trio.Event)
    _changed: trio.Event = attrs.field(factory=trio.Event)
    """Something was sent."""
    _is_stalled: bool = False
    """Whether the peer has not taken all of a message when it was last offered the rest."""
    _waiting: set[Outbox] = attrs.field(factory=set)
    """Those that wait for room."""
    _is_sending: bool = False

    def __attrs_post_init__(self) -> None:
        self._connection.on_stall = self._stalled

    def say(self, message: GuestMessage) -> None:
        """Send an answer, ahead of all output."""
        self._answers.append(message)
        self._something.set()

    def ready(self, source: Source) -> None:
        """A source has something, or has ended."""
        if source in self._ending:
            pass
        elif source.has_ended:
            if source in self._queued:
                self._turns.remove(source)
            self._queued.add(source)
            self._ending.add(source)
            heappush(self._ended, (source.left_bytes, next(self._ages), source))
        elif source not in self._queued:
            self._queued.add(source)
            self._turns.append(source)
        self._something.set()

    def drop(self, source: Source) -> None:
        """Send nothing more of a source that has not ended."""
        if source in self._queued:
            self._queued.discard(source)
            self._turns.remove(source)

    async def answered(self) -> None:
        """Return when few answers wait: what a peer asks is read no faster than it reads."""
        while len(self._answers) > _MOST_ANSWERS:
            await self._changed.wait()

    async def made_room(self, outbox: Outbox, stream: Stream) -> None:
        """Return when a chunk more will cost none of what a command has written before.

        Or when the peer does not take what it is sent: a command waits for the agent, which has
        others to read as well, but never for its peer.
        """
        while outbox.is_full(stream) and not self._is_peer_slow():
            self._waiting.add(outbox)
            try:
                await outbox.moved()
            finally:
                self._waiting.discard(outbox)

    def _is_peer_slow(self) -> bool:
        # Where it was the agent that was held up, there may be room by now.
        return self._is_stalled and not self._connection.is_writable()

    async def told(self) -> None:
        """Return when all answers have been sent."""
        while self._answers or self._is_sending:
            await self._changed.wait()

    async def flushed(self) -> None:
        """Return when all that there was to send has been sent."""
        while self._answers or self._queued or self._is_sending:
            await self._changed.wait()

    async def run(self) -> None:
        """Send until cancelled; a cancelled send leaves half a frame, and the connection useless.

        What nobody will be sent is closed then.

        Raises:
            PeerGone: there is nobody to send to.
        """
        try:
            while True:
                message = self._next()
                if message is None:
                    self._change()
                    await self._something.wait()
                    self._something = trio.Event()
                    continue
                self._is_sending = True
                await self._connection.send(encode(message))
                self._is_sending = self._is_stalled = False
                self._change()
                await trio.lowlevel.checkpoint()
        finally:
            for source in self._queued:
                source.close()

    def _next(self) -> GuestMessage | None:
        if self._answers:
            return self._answers.popleft()
        while self._ended:
            _, age, source = heappop(self._ended)
            message = source.take()
            if message is not None:
                heappush(self._ended, (source.left_bytes, age, source))
                return message
            self._queued.discard(source)
            self._ending.discard(source)
        while self._turns:
            source = self._turns.popleft()
            message = source.take()
            if message is not None:
                self._turns.append(source)
                return message
            self._queued.discard(source)
        return None

    def _stalled(self) -> None:
        """The peer takes nothing more for now, which the connection waits for."""
        self._is_stalled = True
        for outbox in self._waiting:
            outbox.move()

    def _change(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
