"""The other end of a connection, made of the protocol's own codec over real sockets."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from protocol import (
    AgentRequest,
    AgentResponse,
    FrameDecoder,
    decode,
    encode,
    encode_frame,
    requests,
    responses,
)


class Peer:
    """What an agent sees of one connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.trace_ids: list[str | None] = []
        self._decoder = FrameDecoder()

    async def receive(self) -> AgentRequest | None:
        """The next request; None when the client has hung up."""
        while (payload := self._decoder.next_frame()) is None:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self._decoder.receive_data(data)
        envelope = decode(payload, AgentRequest)
        self.trace_ids.append(envelope.trace_id)
        request: AgentRequest = envelope.body
        return request

    async def send(self, *answers: AgentResponse) -> None:
        for answer in answers:
            await self.stream.send_all(encode_frame(encode(answer)))


Conversation = Callable[[Peer], Awaitable[None]]
Answers = Mapping[Any, Sequence[Sequence[AgentResponse]]]
"""For each class of request, one or more lists of answers."""


@asynccontextmanager
async def serving(path: Path, conversation: Conversation) -> AsyncIterator[str]:
    """A unix socket whose every connection has this conversation; gives its address."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await conversation(Peer(stream))

    listener = await _listen(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield f"unix:{path}"
        nursery.cancel_scope.cancel()


async def _listen(path: Path) -> trio.SocketListener:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(16)
    return trio.SocketListener(sock)


class Script:
    """A conversation that gives fixed answers, by the class of the request, and keeps it all.

    Of several lists of answers for a class one follows the other; the last one stays.
    """

    def __init__(self, answers: Answers) -> None:
        self.requests: list[AgentRequest] = []
        self._answers = {variant: list(turns) for variant, turns in answers.items()}

    async def __call__(self, peer: Peer) -> None:
        while (request := await peer.receive()) is not None:
            self.requests.append(request)
            turns = self._answers[type(request)]
            await peer.send(*(turns.pop(0) if len(turns) > 1 else turns[0]))


async def echo_chunks(peer: Peer) -> None:
    """Send back the data of every upload chunk; for tests of big frames."""
    while (request := await peer.receive()) is not None:
        assert isinstance(request, requests.FileWriteChunk)
        await peer.send(responses.DataChunk(request.data, done=True))
