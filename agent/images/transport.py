"""HTTP to registries: requests, with time limits, bounds, our own trust, and a way to stop it.

Imported only where a registry is spoken to, since requests is slow to import.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from agent.images.paced_socket import Pace, PlainSocket, TlsSocket, plain
from agent.images.proxy import bypasses_proxy
from agent.images.registries import TimeLimits
from agent.images.registry_hosts import Endpoint

# Debian's ca-certificates. Not certifi's: an administrator's own CAs are in this one.
_SYSTEM_CA_FILE = Path("/etc/ssl/certs/ca-certificates.crt")
_LARGEST_DOCUMENT = 8 << 20
# More than any server's own limit; http.client's is on each line and on their number, but not on
# how many interim answers (100 Continue) there are.
_LARGEST_HEADERS = 1 << 20


class TransportError(requests.RequestException):
    """A request that we refuse to make, or an answer that we refuse to read; the text is why."""


class Transport(HTTPAdapter):
    """The adapter of one session with one endpoint, for whatever hosts that leads to.

    ``ca_files`` are trusted each for one ``HOST[:PORT]`` only, beside the system's CAs. Unless
    the endpoint is, nothing is spoken to over plain HTTP, a redirect's target neither.
    ``no_proxy`` lists hosts as the environment variable of that name does.

    Any thread may send, and any may call `abort`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        limits: TimeLimits,
        *,
        ca_files: Mapping[str, Path],
        proxy: str | None,
        no_proxy: str | None,
    ) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._ca_files = ca_files
        if endpoint.proxy:
            proxy, no_proxy = endpoint.proxy, None
        self._proxies = {"http": proxy, "https": proxy} if proxy else {}
        self._no_proxy = no_proxy or ""
        self._lock = threading.Lock()
        self._contexts: dict[str | None, ssl.SSLContext] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._aborted = False
        self._expecting = threading.local()
        self._pools = _paced_pools(self)
        if endpoint.skip_verify:
            # Whoever configures it knows.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        # Attempts are counted and spaced by the caller.
        super().__init__(max_retries=0)

    def abort(self) -> None:
        """End all that is being sent or received, now and later: blocked threads get an error."""
        with self._lock:
            self._aborted = True
            sockets = list(self._sockets)
        for opened in sockets:
            try:
                # socket's own, not SSLSocket's, which pulls the session from under the reader.
                socket.socket.shutdown(opened, socket.SHUT_RDWR)
            except OSError:
                continue  # closed by now

    @contextmanager
    def expecting(self, most_bytes: int) -> Iterator[None]:
        """Let the answers to this thread's requests be so long; else they are documents."""
        self._expecting.most_bytes = most_bytes
        try:
            yield
        finally:
            del self._expecting.most_bytes

    # What connections call

    def track(self, opened: socket.socket) -> None:
        """Let `abort` reach a socket that was just connected."""
        with self._lock:
            self._sockets.add(opened)
            aborted = self._aborted
        if aborted:
            opened.close()
            raise ConnectionAbortedError("the pull was cancelled")

    @contextmanager
    def receiving(self, opened: PlainSocket | TlsSocket) -> Iterator[None]:
        """Bound an answer: its headers within the block, all the rest after it."""
        opened.pace = Pace(self._limits, _LARGEST_HEADERS)
        yield
        most_bytes: int = getattr(self._expecting, "most_bytes", _LARGEST_DOCUMENT)
        # Twice, and some more, since chunks have sizes, and the end may have trailers.
        opened.pace = Pace(self._limits, 2 * most_bytes + _LARGEST_HEADERS)

    # What requests calls

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        if proxy.startswith("https:") and "proxy_ssl_context" not in kwargs:
            kwargs["proxy_ssl_context"] = self._context(urlsplit(proxy).netloc.rpartition("@")[2])
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> tuple[Any, Any]:
        netloc = urlsplit(_url_of(request)).netloc
        verified = not (self._endpoint.skip_verify and netloc == self._endpoint.host)
        host, tls = super().build_connection_pool_key_attributes(request, verified, None)
        if host["scheme"] == "https":
            tls["ssl_context"] = self._context(netloc)
        return host, tls

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing to add, certifi's bundle least of all: the context has all that is trusted."""

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        url = _url_of(request)
        scheme, netloc = urlsplit(url)[:2]
        host = netloc.rpartition("@")[2]
        if scheme != "https" and not self._endpoint.is_plain:
            raise TransportError(f"it leads to {scheme}://{host}, which is not HTTPS")
        for name, value in self._endpoint.headers.items():
            if host == self._endpoint.host:
                request.headers.setdefault(name, value)
            elif request.headers.get(name) == value:
                del request.headers[name]  # a redirect's target gets a copy of the request
        response = super().send(
            request,
            stream=True,
            timeout=(self._limits.connect_s, self._limits.silence_s),
            proxies={} if bypasses_proxy(url, self._no_proxy) else self._proxies,
        )
        # These are read to their end, so they have to have one. What a streaming request was
        # made for is bounded by its reader.
        if not stream or response.status_code not in (200, 206):
            body = response.raw.read(_LARGEST_DOCUMENT + 1, decode_content=True)
            if len(body) > _LARGEST_DOCUMENT:
                response.close()
                raise TransportError(f"{host} answers with more than {_LARGEST_DOCUMENT} bytes")
            response.raw.release_conn()
            response.raw = io.BytesIO(body)
        return response

    def _context(self, host: str) -> ssl.SSLContext:
        own = host == self._endpoint.host
        key = host if own or host in self._ca_files else None
        with self._lock:
            if key not in self._contexts:
                # Takes some 30 ms, so it is made when it is first needed.
                self._contexts[key] = self._make_context(host, own=own)
            return self._contexts[key]

    def _make_context(self, host: str, *, own: bool) -> ssl.SSLContext:
        system = str(_SYSTEM_CA_FILE) if _SYSTEM_CA_FILE.exists() else None
        context = ssl.create_default_context(cafile=system)
        context.sslsocket_class = TlsSocket
        trusted = [self._ca_files[host]] if host in self._ca_files else []
        for ca_file in [*trusted, *(self._endpoint.ca_files if own else ())]:
            try:
                context.load_verify_locations(ca_file)
            except OSError as error:  # ssl.SSLError too
                raise TransportError(f"CA file {ca_file} of {host}: {error.strerror}") from error
        if not own:
            return context
        for certificate, secret in self._endpoint.client_certificates:
            try:
                # Without a password OpenSSL would ask for one on the terminal.
                context.load_cert_chain(certificate, secret, password=lambda: b"")
            except OSError as error:
                raise TransportError(
                    f"client certificate {certificate} for {host}: {error.strerror}"
                ) from error
        if self._endpoint.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _url_of(request: requests.PreparedRequest) -> str:
    # As types go it may be missing or bytes; in a request that is sent it is neither.
    assert isinstance(request.url, str)
    return request.url


def _paced_pools(transport: Transport) -> dict[str, type[HTTPConnectionPool]]:
    class PlainConnection(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.sock = plain(self.sock)
            transport.track(self.sock)

        def getresponse(self) -> Any:
            assert isinstance(self.sock, PlainSocket)
            with transport.receiving(self.sock):
                return super().getresponse()

    class TlsConnection(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            transport.track(_outermost(self.sock))

        def getresponse(self) -> Any:
            with transport.receiving(_outermost(self.sock)):
                return super().getresponse()

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = PlainConnection

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = TlsConnection

    return {"http": PlainPool, "https": TlsPool}


def _outermost(opened: Any) -> TlsSocket:
    """The socket itself: within a proxy's TLS urllib3 has one that only looks like it."""
    outermost = getattr(opened, "socket", opened)
    assert isinstance(outermost, TlsSocket)
    return outermost
