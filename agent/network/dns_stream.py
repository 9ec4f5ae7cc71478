"""DNS messages over a byte stream, each behind its length: RFC 1035 section 4.2.2."""

from __future__ import annotations

import trio

from agent.network.host import PIECE_BYTES

_LENGTH_BYTES = 2


class DnsStream:
    """Messages over a stream, which the caller closes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = bytearray()

    async def receive(self) -> bytes | None:
        """The next message; None at the end, also in the middle of one.

        Raises:
            trio.BrokenResourceError: the connection broke.
        """
        while (message := self._whole()) is None:
            data = await self._stream.receive_some(PIECE_BYTES)
            if not data:
                return None
            self._received += data
        return message

    def _whole(self) -> bytes | None:
        end = _LENGTH_BYTES + int.from_bytes(self._received[:_LENGTH_BYTES], "big")
        if len(self._received) < max(end, _LENGTH_BYTES):
            return None
        message = bytes(self._received[_LENGTH_BYTES:end])
        del self._received[:end]
        return message

    async def send(self, message: bytes) -> None:
        """Send one, of at most 65535 bytes. Cancelled, it leaves half of one behind.

        Raises:
            trio.BrokenResourceError: the connection broke.
        """
        data = memoryview(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
        while data:
            await self._stream.send_all(data[:PIECE_BYTES])
            data = data[PIECE_BYTES:]
