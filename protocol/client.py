"""The host's end of a connection to an agent, over any trio stream."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final, Self, TypeVar

import trio

from protocol import codec, requests, responses
from protocol.address import parse_address
from protocol.errors import ProtocolError
from protocol.requests import AgentRequest
from protocol.responses import AgentResponse
from protocol.stream import ConnectionFailed, FrameStream, open_stream
from protocol.workload_client import AuthenticationFailed, WorkloadClient, open_workload_client

Answer = TypeVar("Answer", bound=AgentResponse)

_UNANSWERED: Final = (requests.Stdin, requests.Resize)

__all__ = [
    "AgentClient",
    "AgentRefused",
    "Answers",
    "AuthenticationFailed",
    "ConnectionFailed",
    "WorkloadClient",
    "connect",
    "expect",
    "is_last",
    "open_client",
    "open_workload_client",
]


class AgentRefused(Exception):
    """The agent answered with an error: its ``message``, and its ``code`` if it gave one."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def expect(answer: AgentResponse, kind: type[Answer]) -> Answer:
    """The answer, known to be of a class; raises AgentRefused if it is an Error instead."""
    if isinstance(answer, kind):
        return answer
    if isinstance(answer, responses.Error):
        raise AgentRefused(answer.message, answer.code)
    raise ProtocolError(
        f"expected the answer {codec.wire_name(kind)}, got {codec.wire_name(type(answer))}"
    )


def is_last(answer: AgentResponse) -> bool:
    """Whether an answer ends its request."""
    if isinstance(answer, responses.DataChunk):
        return answer.done
    return not isinstance(
        answer, (responses.Progress, responses.Started, responses.Stdout, responses.Stderr)
    )


class Answers:
    """The answers of one request as they come; iteration ends after the last one."""

    def __init__(self, client: "AgentClient") -> None:
        self._client = client
        self.complete = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AgentResponse:
        if self.complete:
            raise StopAsyncIteration
        answer = await self._client.receive()
        self.complete = is_last(answer)
        return answer


class AgentClient:
    """One connection to an agent.

    Any number of tasks may use it: their requests wait for each other, since a connection
    carries one at a time. While a stream is open, ``send`` adds its follow-ups (stdin, resize,
    chunks), from any task.

    The connection is closed, because its position is lost, when a send is cancelled or a
    request is left before its last answer. The agent then ends what it was doing. All methods
    raise ConnectionFailed when the agent is gone, and ProtocolError for frames or messages
    that are none.

    ``name`` is what errors call the other end; ``send_size`` limits the bytes of one send.
    Closing the client closes the stream.
    """

    def __init__(
        self, stream: trio.abc.Stream, *, name: str = "the agent", send_size: int | None = None
    ) -> None:
        self._frames = FrameStream(stream, name, send_size)
        self._request_lock = trio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up."""
        await self._frames.aclose()

    async def request(self, message: AgentRequest, trace_id: str | None = None) -> AgentResponse:
        """Ask, and return the last answer; those before it are dropped."""
        async with self.stream(message, trace_id) as answers:
            async for answer in answers:
                last = answer
        return last

    async def ask(
        self, message: AgentRequest, kind: type[Answer], trace_id: str | None = None
    ) -> Answer:
        """Ask, and return the last answer, which must be of a class; raises AgentRefused."""
        return expect(await self.request(message, trace_id), kind)

    @asynccontextmanager
    async def stream(
        self, message: AgentRequest, trace_id: str | None = None
    ) -> AsyncIterator[Answers]:
        """Ask, and give all answers one by one.

        ::

            async with client.stream(requests.Pull("alpine")) as answers:
                async for answer in answers: ...
        """
        if isinstance(message, _UNANSWERED):
            raise ValueError(f"{codec.wire_name(type(message))} has no answer: use send()")
        pieces = self._pieces(message, trace_id)
        async with self._request_lock:
            answers = Answers(self)
            try:
                await self._frames.send(pieces)
                yield answers
            finally:
                if not answers.complete:
                    await self._frames.abandon()

    async def send(self, message: AgentRequest, trace_id: str | None = None) -> None:
        """Send a message and wait for no answer."""
        await self._frames.send(self._pieces(message, trace_id))

    def _pieces(self, message: AgentRequest, trace_id: str | None) -> list[bytes | memoryview]:
        return self._frames.pieces(codec.encode(message, trace_id))

    async def receive(self) -> AgentResponse:
        """The next answer on the connection, whatever it belongs to; for ``Answers``."""
        payload = await self._frames.receive("the agent hung up before its answer")
        answer: AgentResponse = codec.decode(payload, AgentResponse).body
        return answer


@asynccontextmanager
async def open_client(address: str) -> AsyncIterator[AgentClient]:
    """A client connected to ``unix:PATH``, ``vsock:CID:PORT`` or ``mux:PATH:PORT``.

    Closes the connection on leaving. Raises InvalidAddress or ConnectionFailed.
    """
    async with await connect(address) as client:
        yield client


async def connect(address: str) -> AgentClient:
    """The same, to be closed by the caller."""
    place = parse_address(address)
    stream, send_size = await open_stream(place)
    return AgentClient(stream, name=str(place), send_size=send_size)
