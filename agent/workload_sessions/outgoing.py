"""All that a connection is to be sent, by one task, in the order of its urgency."""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

import attrs
import trio

from agent.connection import Connection
from agent.processes.process import Stream
from agent.workload_sessions.outbox import Outbox
from protocol import GuestMessage, encode

# A peer that takes nothing for so long is slow: from then on its commands do not wait for it.
PATIENCE_S = 0.05
# Answers that wait for a peer; with more, its next message waits.
_MOST_ANSWERS = 64


class Source(Protocol):
    """Output to be taken as messages: a command's own, or the log's."""

    @property
    def has_ended(self) -> bool:
        """Whether all of it is there, its end included."""

    def take(self) -> GuestMessage | None:
        """The next message; None: there is none at the moment."""


@attrs.define(eq=False)
class Outgoing:
    """Answers go first, then the rest of what has ended with its end, then output in turns."""

    _connection: Connection
    _answers: deque[GuestMessage] = attrs.field(factory=deque)
    _ended: deque[Source] = attrs.field(factory=deque)
    _turns: deque[Source] = attrs.field(factory=deque)
    _queued: set[Source] = attrs.field(factory=set)
    _something: trio.Event = attrs.field(factory=trio.Event)
    _changed: trio.Event = attrs.field(factory=trio.Event)
    """Something was sent."""
    _slow_at: float = math.inf
    """When the peer will have been waited for long enough; for ever while it is not."""
    _patient: set[trio.CancelScope] = attrs.field(factory=set)
    """Of the commands that wait for room."""
    _is_sending: bool = False

    def __attrs_post_init__(self) -> None:
        self._connection.on_stall = self._stalled

    def say(self, message: GuestMessage) -> None:
        """Send an answer, ahead of all output."""
        self._answers.append(message)
        self._something.set()

    def ready(self, source: Source) -> None:
        """A source has something, or has ended."""
        if source.has_ended and source not in self._ended:
            if source in self._queued:
                self._turns.remove(source)
            self._queued.add(source)
            self._ended.append(source)
        elif source not in self._queued:
            self._queued.add(source)
            self._turns.append(source)
        self._something.set()

    def drop(self, source: Source) -> None:
        """Send nothing more of a source."""
        if source in self._queued:
            self._queued.discard(source)
            (self._ended if source in self._ended else self._turns).remove(source)

    async def answered(self) -> None:
        """Return when few answers wait: what a peer asks is read no faster than it reads."""
        while len(self._answers) > _MOST_ANSWERS:
            await self._changed.wait()

    async def made_room(self, outbox: Outbox, stream: Stream) -> None:
        """Return when a chunk more will cost none of what a command has written before.

        Or when the peer is slow: the command waits for the agent, but never for that.
        """
        while outbox.is_full(stream):
            if trio.current_time() >= self._slow_at:
                # If it was the agent that was held up, the peer's room is seen only now.
                await trio.lowlevel.checkpoint()
                if trio.current_time() >= self._slow_at:
                    return
            with trio.CancelScope(deadline=self._slow_at) as patience:
                self._patient.add(patience)
                try:
                    await outbox.taken.wait()
                finally:
                    self._patient.discard(patience)

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

        Raises:
            PeerGone: there is nobody to send to.
        """
        while True:
            message = self._next()
            if message is None:
                self._change()
                await self._something.wait()
                self._something = trio.Event()
                continue
            self._is_sending = True
            await self._connection.send(encode(message))
            self._is_sending = False
            if self._slow_at < math.inf:
                self._set_patience(math.inf)
            self._change()
            await trio.lowlevel.checkpoint()

    def _next(self) -> GuestMessage | None:
        if self._answers:
            return self._answers.popleft()
        while self._ended:
            message = self._ended[0].take()
            if message is not None:
                return message
            self._queued.discard(self._ended.popleft())
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
        self._set_patience(trio.current_time() + PATIENCE_S)

    def _set_patience(self, slow_at: float) -> None:
        self._slow_at = slow_at
        for patience in self._patient:
            patience.deadline = slow_at

    def _change(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
