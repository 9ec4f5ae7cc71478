"""A host's connection to a port of an agent, wherever that is."""

import socket
from typing import Final

import trio

from protocol.address import Address, MuxAddress, UnixAddress
from protocol.constants import VSOCK_SEND_SIZE

_LONGEST_MUX_REPLY: Final = 64


class ConnectionFailed(Exception):
    """There is no agent, or no longer one; the text is one line and names the address."""


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
