"""The wire without our client: frames of any content, sent and received as they are."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio

from protocol import FrameDecoder, encode_frame

READ_BYTES = 64 * 1024

Answer = dict[str, object]


class Wire:
    """One connection to an agent, spoken to in raw JSON."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._decoder = FrameDecoder()

    async def send(self, message: Mapping[str, object]) -> None:
        await self.stream.send_all(encode_frame(json.dumps(message).encode()))

    async def receive(self) -> Answer | None:
        """The next answer; None when the agent has closed the connection."""
        while (payload := self._decoder.next_frame()) is None:
            data = await self.stream.receive_some(READ_BYTES)
            if not data:
                return None
            self._decoder.receive_data(data)
        answer = json.loads(payload)
        assert isinstance(answer, dict)
        return answer

    async def ask(self, method: str, **fields: object) -> Answer:
        """Send a request and take its final answer; progress is passed over."""
        await self.send({"method": method, **fields})
        while (answer := await self.receive()) is not None:
            if answer["status"] != "progress":
                return answer
        raise EOFError(f"the agent closed the connection on {method}")


@asynccontextmanager
async def open_wire(address: str) -> AsyncIterator[Wire]:
    """Connect to `unix:PATH` or `mux:PATH:PORT`."""
    kind, _, where = address.partition(":")
    if kind == "unix":
        async with await trio.open_unix_socket(where) as stream:
            yield Wire(stream)
        return
    path, _, port = where.rpartition(":")
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(f"CONNECT {port}\n".encode())
        # Byte by byte: what follows the line is the agent's.
        line = b""
        while not line.endswith(b"\n"):
            byte = await stream.receive_some(1)
            if not byte:
                raise EOFError(f"nobody listens on port {port} of the machine")
            line += byte
        yield Wire(stream)
