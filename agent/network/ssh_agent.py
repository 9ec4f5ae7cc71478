"""The host's SSH agent, forwarded: a unix socket whose connections are the host's."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from select import EPOLLHUP, EPOLLONESHOT, epoll

import trio

from agent.errors import cause_of
from agent.network.bounded import serve_bounded
from agent.network.host import PIECE_BYTES, Host
from protocol.constants import Port

log = logging.getLogger(__name__)

VARIABLE = "SSH_AUTH_SOCK"
SOCKET = Path("/tmp/ssh-agent.sock")

# Two descriptors each, of the 1024 that the agent may have.
AT_ONCE = 128
_BACKLOG = 128


@contextmanager
def listening(path: Path = SOCKET) -> Iterator[socket.socket]:
    """A socket at ``path`` for everyone in the VM, for the block; then it is closed and gone.

    What an agent that was killed left there is replaced, in one step.

    Raises:
        OSError: EADDRINUSE: somebody listens there; or the path cannot be used.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        listener.bind(str(new))
        # Whoever a container's command runs as.
        new.chmod(0o666)
        listener.listen(_BACKLOG)
        new.rename(path)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


async def serve(listener: socket.socket, host: Host) -> None:
    """Bridge every connection to the host's SSH agent until cancelled; closes the listener."""
    await serve_bounded(
        "ssh agent",
        trio.SocketListener(trio.socket.from_stdlib_socket(listener)),
        AT_ONCE,
        partial(_bridge_to, host),
    )


async def _bridge_to(host: Host, client: trio.SocketStream) -> None:
    try:
        server = await host.connect(Port.SSH_AGENT)
    except OSError as error:
        log.info("ssh agent: the host has none on port %d: %s", Port.SSH_AGENT, cause_of(error))
        return
    async with server:
        await bridge(client, server)


async def bridge(one: trio.SocketStream, other: trio.SocketStream) -> None:
    """Carry bytes both ways until both ends have ended, or one is gone altogether.

    The end of one direction is passed on, and the other goes on. The caller closes both.
    """
    ended: list[trio.SocketStream] = []
    async with trio.open_nursery() as nursery:

        async def carry(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            # What is left of a broken end is heard by the other direction: its last words, its end.
            with suppress(trio.BrokenResourceError):
                while data := await source.receive_some(PIECE_BYTES):
                    await sink.send_all(data)
            with suppress(trio.BrokenResourceError):
                await sink.send_eof()
            ended.append(source)
            if len(ended) < 2:
                # Half a close, or the whole: one that is gone wants no answer any more.
                await _gone(source.socket)
            nursery.cancel_scope.cancel()

        nursery.start_soon(carry, one, other)
        nursery.start_soon(carry, other, one)


async def _gone(peer: trio.socket.SocketType) -> None:
    """Return when both directions of a connection are down, as epoll_ctl(2) tells unasked."""
    with epoll() as watch:
        watch.register(peer.fileno(), EPOLLHUP | EPOLLONESHOT)
        await trio.lowlevel.wait_readable(watch.fileno())
