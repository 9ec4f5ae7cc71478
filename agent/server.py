"""Accept connections, on vsock or a unix socket, and give each a conversation of its own."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable

import trio

from agent.connection import Connection
from protocol.constants import Cid

log = logging.getLogger(__name__)


async def serve(
    listener: socket.socket,
    vsock_peers: frozenset[int],
    converse: Callable[[Connection], Awaitable[None]],
) -> None:
    """Serve every connection on ``listener`` until cancelled; the caller closes the listener.

    ``vsock_peers`` are the CIDs that are served besides the host's; ``converse`` has a whole
    conversation, and leaves the connection to be closed.
    One connection's defect ends that connection alone. When descriptors run out, trio's accept
    loop logs it and goes on a moment later.
    """
    listener.setblocking(False)
    trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))

    async def welcome(stream: trio.SocketStream) -> None:
        # trio's wrapper gives the descriptor up, so that exactly one object closes it.
        peer = socket.socket(fileno=stream.socket.detach())
        with peer:
            if not _is_served(peer, vsock_peers):
                return
            try:
                await converse(Connection(peer))
            except Exception:
                log.exception("a conversation failed")

    await trio.serve_listeners(welcome, [trio_listener])


def _is_served(peer: socket.socket, vsock_peers: frozenset[int]) -> bool:
    """On vsock only the host is served, and whom a test boot names: a container reaches this
    port through the loopback or the guest's own CID, and would be root in the VM."""
    if peer.family != socket.AF_VSOCK:
        return True
    try:
        cid = peer.getpeername()[0]
    except OSError:
        # Connected and gone again before it was accepted, as boot probes do.
        return False
    if cid == Cid.HOST or cid in vsock_peers:
        return True
    log.warning("refused a connection from CID %d: only the host is served", cid)
    return False
