"""A host's connection to a port of an agent, wherever that is, and frames on it."""

import socket
from typing import Final

import trio

from protocol.address import Address, MuxAddress, UnixAddress
from protocol.constants import VSOCK_SEND_SIZE
from protocol.framing import FrameDecoder, frame_pieces

_LONGEST_MUX_REPLY: Final = 64


class ConnectionFailed(Exception):
    """There is no agent, or no longer one; the text is one line and names the address."""


class FrameStream:
    """Frames both ways over a trio stream, which it takes over.

    Any task may send, and one may receive. ``name`` is what errors call the other end;
    ``send_size`` limits the bytes of one send. Methods raise ConnectionFailed when the agent is
    gone, and ProtocolError for frames that are none.
    """

    def __init__(self, stream: trio.abc.Stream, name: str, send_size: int | None) -> None:
        self.name = name
        self.stream = stream
        self._send_size = send_size
        self._decoder = FrameDecoder()
        self._send_lock = trio.Lock()

    async def aclose(self) -> None:
        """Hang up."""
        await self.stream.aclose()

    async def abandon(self) -> None:
        """Hang up at once; for a connection whose position is lost."""
        await trio.aclose_forcefully(self.stream)

    def pieces(self, payload: bytes) -> list[bytes | memoryview]:
        """A frame, for ``send``."""
        return frame_pieces(payload, self._send_size)

    async def send(self, pieces: list[bytes | memoryview]) -> None:
        """Send one frame, whole. The connection is closed if this is cancelled."""
        async with self._send_lock:
            try:
                for piece in pieces:
                    await self.stream.send_all(piece)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._closed() from error
            except BaseException:
                # Nobody knows how much of the frame is out.
                await self.abandon()
                raise

    async def receive(self, hung_up: str = "the agent hung up") -> bytes:
        """The next frame's payload; ``hung_up`` is what its lack means. Safe to cancel."""
        while (payload := self._decoder.next_frame()) is None:
            try:
                data = await self.stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._closed() from error
            if not data:
                raise ConnectionFailed(f"{self.name}: {hung_up}")
            self._decoder.receive_data(data)
        return payload

    def _closed(self) -> ConnectionFailed:
        return ConnectionFailed(f"{self.name}: the connection is closed")


async def open_stream(place: Address) -> tuple[trio.SocketStream, int | None]:
    """A connection, and how many bytes at most one send on it may have; the caller closes it.

    Raises ConnectionFailed.
    """
    try:
        stream = await _open_stream(place)
    except OSError as error:
        cause = error.strerror or error
        raise ConnectionFailed(f"cannot connect to {place}: {cause}") from error
    on_vsock = stream.socket.family == socket.AF_VSOCK
    return stream, VSOCK_SEND_SIZE if on_vsock else None


async def _open_stream(place: Address) -> trio.SocketStream:
    if isinstance(place, UnixAddress):
        return await trio.open_unix_socket(place.path)
    if isinstance(place, MuxAddress):
        return await _open_multiplexed(place)
    sock = trio.socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        await sock.connect((place.cid, place.port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def _open_multiplexed(place: MuxAddress) -> trio.SocketStream:
    stream = await trio.open_unix_socket(place.path)
    try:
        await stream.send_all(b"CONNECT %d\n" % place.port)
        # Byte by byte: what follows the line is the guest's.
        reply = b""
        while not reply.endswith(b"\n") and len(reply) < _LONGEST_MUX_REPLY:
            data = await stream.receive_some(1)
            if not data:
                raise ConnectionFailed(f"cannot connect to {place}: nothing listens there")
            reply += data
        if not reply.startswith(b"OK ") or not reply.endswith(b"\n"):
            raise ConnectionFailed(f"cannot connect to {place}: it answered {reply!r}")
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        raise ConnectionFailed(f"cannot connect to {place}: it hung up") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream
