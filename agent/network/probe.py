"""Whether the VM reaches a URL, and if not, how far it gets."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import attrs
import trio

from agent.errors import cause_of
from protocol.values import HttpRequest, NameResolution, NetworkReport, TcpConnect

# Of the 10 s that a report may take, some are for its way.
LIMIT_S = 9.5
# For each address but the last: one that does not answer leaves time for another.
_ADDRESS_S = 3.0

# A resolver that does not answer keeps its thread for longer than its report has time.
_THREADS = 8

_SYSTEM_CA_FILE = Path("/etc/ssl/certs/ca-certificates.crt")
_PORTS = {"http": 80, "https": 443}

Result = TypeVar("Result")


@attrs.frozen
class _Target:
    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> _Target:
        """What to reach. Raises ValueError: the URL is none of http or https."""
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError("expected http://HOST[:PORT]/PATH, or https")
        # As a request has it: names of other scripts are written in ASCII (RFC 3490).
        host = parts.hostname.encode("idna").decode("ascii")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.scheme, host, parts.port or _PORTS[parts.scheme], path)


@attrs.frozen
class _Address:
    family: int
    where: Any
    """As the family has it."""

    def __str__(self) -> str:
        host, port = self.where[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@attrs.frozen
class _Step(Generic[Result]):
    """How a step went: its ``result``, or an error."""

    duration_ms: int = 0
    error: str | None = "not tried"
    result: Result | None = None


class Probe:
    """Tries URLs, any number at once. Makes no connection that it does not close."""

    def __init__(self) -> None:
        self._threads = trio.CapacityLimiter(_THREADS)

    async def report(self, url: str, limit_s: float = LIMIT_S) -> NetworkReport:
        """Resolve the name, connect, and ask for the URL, within ``limit_s`` seconds in all.

        Redirects are not followed: any answer tells that the network works.
        """
        deadline = trio.current_time() + limit_s
        dns: _Step[Sequence[_Address]] = _Step()
        tcp: _Step[tuple[_Address, socket.socket]] = _Step()
        http: _Step[int] = _Step()
        try:
            target = _Target.of(url)
        except ValueError as error:
            return _report(_Step(error=f"url: {cause_of(error)}"), tcp, http)
        dns = await _timed(deadline, partial(self._resolve, target))
        if dns.result is not None:
            tcp = await _timed(deadline, partial(_connect, dns.result))
        if tcp.result is not None:
            with tcp.result[1] as connection:
                http = await _timed(deadline, partial(self._ask, target, connection, limit_s))
        return _report(dns, tcp, http)

    async def _resolve(self, target: _Target) -> Sequence[_Address]:
        found = await trio.to_thread.run_sync(
            partial(socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM),
            abandon_on_cancel=True,
            limiter=self._threads,
        )
        return [_Address(family, where) for family, _, _, _, where in found]

    async def _ask(self, target: _Target, connection: socket.socket, limit_s: float) -> int:
        try:
            return await trio.to_thread.run_sync(
                _status_of,
                target,
                # The thread's own: TLS would take ours away from us.
                connection.dup(),
                limit_s,
                abandon_on_cancel=True,
                limiter=self._threads,
            )
        finally:
            # Nor does it wait any longer than we do.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


async def _timed(deadline: float, work: Callable[[], Awaitable[Result]]) -> _Step[Result]:
    begun = trio.current_time()

    def duration_ms() -> int:
        return round((trio.current_time() - begun) * 1000)

    with trio.CancelScope(deadline=deadline):
        try:
            result = await work()
        except OSError as error:
            return _Step(duration_ms(), cause_of(error))
        return _Step(duration_ms(), None, result)
    return _Step(duration_ms(), f"no answer within {duration_ms() / 1000:.1f} s")


async def _connect(addresses: Sequence[_Address]) -> tuple[_Address, socket.socket]:
    """A connection to the first that takes it. Raises OSError: what the last one said."""
    *others, last = addresses
    for address in others:
        with suppress(OSError), trio.move_on_after(_ADDRESS_S):
            return address, await _connected(address)
    return last, await _connected(last)


async def _connected(address: _Address) -> socket.socket:
    with trio.socket.socket(address.family, socket.SOCK_STREAM) as connection:
        try:
            await connection.connect(address.where)
        except OSError as error:
            # trio's words about it are for programmers.
            number = error.errno or 0
            raise OSError(number, os.strerror(number), str(address)) from error
        return socket.socket(fileno=connection.detach())


def _status_of(target: _Target, connection: socket.socket, limit_s: float) -> int:
    """The status that a GET is answered with. Blocks; closes the connection. Raises OSError."""
    # Imported when first used: both are large.
    from http.client import HTTPConnection, HTTPException

    with connection:
        connection.settimeout(limit_s)
        try:
            if target.scheme == "https":
                connection = _tls(connection, target.host)
            client = HTTPConnection(target.host, target.port)
            client.sock = connection
            client.request("GET", target.path, headers={"User-Agent": "innkeep", "Accept": "*/*"})
            return client.getresponse().status
        except (HTTPException, ValueError) as error:
            raise OSError(f"not HTTP: {cause_of(error)}") from error
        finally:
            connection.close()


def _tls(connection: socket.socket, host: str) -> socket.socket:
    import ssl

    cafile = _SYSTEM_CA_FILE if _SYSTEM_CA_FILE.exists() else None
    context = ssl.create_default_context(cafile=cafile)
    return context.wrap_socket(connection, server_hostname=host)


def _report(
    dns: _Step[Sequence[_Address]],
    tcp: _Step[tuple[_Address, socket.socket]],
    http: _Step[int],
) -> NetworkReport:
    addresses = [address.where[0] for address in dns.result or ()]
    return NetworkReport(
        ok=http.error is None,
        dns=NameResolution(dns.error is None, dns.duration_ms, dns.error, tuple(addresses)),
        tcp=TcpConnect(
            tcp.error is None,
            tcp.duration_ms,
            tcp.error,
            str(tcp.result[0]) if tcp.result is not None else None,
        ),
        http=HttpRequest(http.error is None, http.duration_ms, http.error, http.result),
    )
