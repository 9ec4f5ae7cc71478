"""A request's two-way line: what its handler says before the last answer, and hears meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

from agent.connection import THREADED_BYTES, Connection
from protocol import (
    AgentRequest,
    AgentResponse,
    Envelope,
    decode,
    encode,
    frame_in_pieces,
    frame_pieces,
    responses,
)
from protocol.errors import MalformedMessage

Message = TypeVar("Message")
Request = Envelope[AgentRequest]


class Channel:
    """Sends answers and takes follow-ups; one for each connection, handed to each handler in turn.

    Closed by the session. Handlers may send from one task and take follow-ups in another.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held: bytes | Request | None = None
        self._ended = False
        self._once_answered: list[Callable[[], None]] = []

    async def send(self, response: AgentResponse) -> None:
        """Send one answer. A cancelled send ends the connection: half a frame may be out.

        Raises:
            PeerGone: there is nobody to hear it.
        """
        if (
            isinstance(response, responses.DataChunk)
            and self.sends_in_pieces
            and len(response.data) >= THREADED_BYTES
        ):
            await self.send_each(each for each in (response,))
        else:
            await self._connection.send(encode(response))

    @property
    def sends_in_pieces(self) -> bool:
        """Whether a large frame is many small sends, which are a thread's: vsock."""
        return self._connection.piece_bytes is not None

    async def send_each(self, answers: Generator[AgentResponse]) -> None:
        """Send what a generator gives, which is run and closed in the thread that sends: so large
        data waits for no other thread, and is encoded piece by piece as it goes.

        For a channel that ``sends_in_pieces``. Raises what the generator raises, and as ``send``.
        """
        piece_bytes = self._connection.piece_bytes
        assert piece_bytes is not None
        await self._connection.send_in_thread(_pieces(answers, piece_bytes))

    @property
    def is_torn(self) -> bool:
        """Whether half a frame is out, so that nothing more can be said."""
        return self._connection.is_torn

    def widen(self) -> None:
        """Make room for large answers, of which there will be many."""
        self._connection.widen()

    async def follow_up(self, *kinds: type[Message]) -> Message | None:
        """The next message, if it is one of ``kinds``; None when no more of them will come.

        Any other message, and one that does not parse, waits for the session, and ends this
        request's follow-ups. Safe to cancel.

        Raises:
            FrameTooLarge, PeerGone: as for ``Connection.receive``.
        """
        if self._held is not None or self._ended:
            return None
        payload = await self._connection.receive()
        if payload is None:
            self._ended = True
            return None
        try:
            envelope = decode(payload, AgentRequest)
        except MalformedMessage:
            self._held = payload
            return None
        if isinstance(envelope.body, kinds):
            return envelope.body
        self._held = envelope
        return None

    def once_answered(self, then: Callable[[], None]) -> None:
        """For handlers: call ``then`` after the last answer was sent, or could not be."""
        self._once_answered.append(then)

    def answered(self) -> None:
        """For the session: the last answer of the request is out, or lost."""
        waiting, self._once_answered = self._once_answered, []
        for then in waiting:
            then()

    async def next_request(self) -> Request | None:
        """For the session: the next message, or None at the end of the peer's requests.

        Raises:
            MalformedMessage: this one cannot be read; the next can.
            FrameTooLarge, PeerGone: as for ``Connection.receive``.
        """
        held, self._held = self._held, None
        if isinstance(held, Envelope):
            return held
        if held is None and self._ended:
            return None
        payload = held if held is not None else await self._connection.receive()
        return None if payload is None else decode(payload, AgentRequest)

    def pending_request(self) -> Request | None:
        """For the session, when the peer has gone: the next message that had arrived whole."""
        held, self._held = self._held, None
        while not isinstance(held, Envelope):
            payload = self._connection.receive_pending()
            if payload is None:
                return None
            try:
                held = decode(payload, AgentRequest)
            except MalformedMessage:
                continue
        return held


def _pieces(answers: Generator[AgentResponse], piece_bytes: int) -> Generator[bytes | memoryview]:
    with closing(answers):
        for answer in answers:
            yield from frame_in_pieces(answer, piece_bytes) or frame_pieces(
                encode(answer), piece_bytes
            )
