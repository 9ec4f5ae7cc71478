"""Reaching the host: its vsock ports, or unix sockets where there is no vsock."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import attrs
import trio

from protocol.constants import VSOCK_SEND_SIZE, Cid

# On vsock a port that nobody listens on may take the kernel 2 s to find out.
CONNECT_S = 5.0

PIECE_BYTES = VSOCK_SEND_SIZE
"""What one send may carry, whatever is below it."""


@attrs.frozen
class Host:
    """The machine outside. ``sockets``: its port N is a unix socket at that path with ``_N`` behind
    it, as Firecracker, Cloud Hypervisor and vhost-device-vsock have it; else it is vsock's, and
    ``reachable`` says whether there is any."""

    sockets: Path | None = None
    reachable: bool = True

    async def connect(self, port: int) -> trio.SocketStream:
        """A connection to a port of the host, which the caller closes.

        Raises:
            OSError: nobody listens there, or there is no host to be reached.
        """
        if self.sockets is None and not self.reachable:
            raise OSError(errno.EHOSTUNREACH, f"{os.strerror(errno.EHOSTUNREACH)} without vsock")
        family, where = (
            (socket.AF_VSOCK, (Cid.HOST, port))
            if self.sockets is None
            else (socket.AF_UNIX, f"{self.sockets}_{port}")
        )
        connection = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            with trio.fail_after(CONNECT_S):
                await connection.connect(where)
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError | trio.TooSlowError):
                raise
            number = getattr(error, "errno", None) or errno.ETIMEDOUT
            raise OSError(number, os.strerror(number)) from error
        return trio.SocketStream(connection)
