"""Noticing that a peer has gone, whatever still lies unread before its end.

Reading tells of an end only once everything before it was read, and a session that works on a
request does not read. So one epoll descriptor watches all connections for their hang-up alone,
and one task of the agent waits for that descriptor (epoll(7): an epoll descriptor is itself
readable when it has events). A connection costs one epoll_ctl, an idle one nothing.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


class HangupWatch:
    """Calls back, once, when the peer of a watched socket hangs up."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._on_hangup: dict[int, Callable[[], None]] = {}

    @property
    def watched(self) -> int:
        """How many sockets are watched now."""
        return len(self._on_hangup)

    async def run(self) -> None:
        """Deliver hang-ups until cancelled, then close the descriptor."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for fd, _ in self._epoll.poll(0):
                    on_hangup = self._on_hangup.pop(fd, None)
                    if on_hangup is not None:
                        on_hangup()
        finally:
            self._epoll.close()

    @contextmanager
    def watching(self, peer: socket.socket, on_hangup: Callable[[], None]) -> Iterator[None]:
        """Watch ``peer`` inside the block; it must stay open that long.

        On vsock any shutdown by the peer counts. On a unix socket only its close does: a
        half-close there is the end of its requests, and the answer is still wanted. EPOLLHUP,
        which unix(7) gives when both directions are down, needs no asking for.
        """
        events = select.EPOLLET | select.EPOLLONESHOT
        if peer.family == socket.AF_VSOCK:
            events |= select.EPOLLRDHUP
        fd = peer.fileno()
        self._on_hangup[fd] = on_hangup
        self._epoll.register(fd, events)
        try:
            yield
        finally:
            self._on_hangup.pop(fd, None)
            if not self._epoll.closed:
                self._epoll.unregister(fd)
