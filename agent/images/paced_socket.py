"""Sockets that give up on a peer that sends too slowly, or without end.

What is waited for is bounded here and not where answers are read, since a peer can drip, or flood,
also what readers never hand on: headers, chunk sizes, trailers.

Imported only where a registry is spoken to, since ssl is slow to import.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any

from agent.images.registries import TimeLimits


class TooSlow(TimeoutError):
    """So little came for so long that it is no answer; the text says how much."""


class TooMuch(OSError):
    """More came than the answer can have; the text says how much it may have."""


class Pace:
    """One answer's bytes against the clock, and against ``most_bytes``."""

    def __init__(self, limits: TimeLimits, most_bytes: int) -> None:
        self._limits = limits
        self._most_bytes = most_bytes
        self._arrived = 0
        self._window_bytes = 0
        self._window_s = 0.0

    def count(self, arrived: int, waited_s: float) -> None:
        """So many bytes took so long to come.

        Raises:
            TooSlow, TooMuch: they are the last.
        """
        self._arrived += arrived
        if self._arrived > self._most_bytes:
            raise TooMuch(f"more than {self._most_bytes} bytes")
        self._window_bytes += arrived
        self._window_s += waited_s
        if self._window_s < self._limits.window_s:
            return
        if self._window_bytes < self._limits.window_bytes:
            raise TooSlow(f"{self._window_bytes} bytes in {self._window_s:.0f} s")
        self._window_bytes = 0
        self._window_s = 0.0


class PlainSocket(socket.socket):
    """Without TLS. ``pace`` counts what is received, where it is set."""

    pace: Pace | None = None

    def recv_into(self, *args: Any) -> int:
        begun = time.monotonic()
        arrived = super().recv_into(*args)
        if self.pace is not None:
            self.pace.count(arrived, time.monotonic() - begun)
        return arrived


class TlsSocket(ssl.SSLSocket):
    """For ``SSLContext.sslsocket_class``. ``pace`` as in `PlainSocket`."""

    pace: Pace | None = None

    def recv_into(self, *args: Any) -> int:
        begun = time.monotonic()
        arrived = super().recv_into(*args)
        if self.pace is not None:
            self.pace.count(arrived, time.monotonic() - begun)
        return arrived

    def recv(self, *args: Any) -> bytes:  # what urllib3 calls where TLS lies within TLS
        begun = time.monotonic()
        data = super().recv(*args)
        if self.pace is not None:
            self.pace.count(len(data), time.monotonic() - begun)
        return data


def plain(opened: socket.socket) -> PlainSocket:
    """A connected socket as one whose pace counts; the other object is closed."""
    timeout_s = opened.gettimeout()
    paced = PlainSocket(fileno=opened.detach())
    paced.settimeout(timeout_s)
    return paced
