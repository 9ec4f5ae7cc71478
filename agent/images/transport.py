"""HTTP to registries: requests, with time limits, bounds, our own trust, and a way to stop it.

Imported only where a registry is spoken to, since requests is slow to import.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from agent.images.no_proxy import bypasses_proxy

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30

# Debian's ca-certificates. Not certifi's: an administrator's own CAs are in this one.
_SYSTEM_CA_FILE = Path("/etc/ssl/certs/ca-certificates.crt")
_LARGEST_DOCUMENT = 8 << 20


class TransportError(requests.RequestException):
    """A request that we refuse to make, or an answer that we refuse to read; the text is why."""


class Transport(HTTPAdapter):
    """The adapter of one session with one registry, for whatever hosts that leads to.

    ``ca_files`` are trusted each for one ``HOST[:PORT]`` only, beside the system's CAs. Without
    ``plain_http`` nothing goes over plain HTTP, a redirect's target neither. ``no_proxy`` lists
    hosts as the environment variable of that name does.

    Any thread may send, and any may call `abort`.
    """

    def __init__(
        self,
        *,
        plain_http: bool,
        ca_files: Mapping[str, Path],
        proxy: str | None,
        no_proxy: str | None,
    ) -> None:
        self._plain_http = plain_http
        self._ca_files = ca_files
        self._proxies = {"http": proxy, "https": proxy} if proxy else {}
        self._no_proxy = no_proxy or ""
        self._lock = threading.Lock()
        self._contexts: dict[Path | None, ssl.SSLContext] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._aborted = False
        self._pools = _tracking_pools(self)
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

    def track(self, opened: socket.socket) -> None:
        """Let `abort` reach a socket that was just connected."""
        with self._lock:
            self._sockets.add(opened)
            aborted = self._aborted
        if aborted:
            opened.close()
            raise ConnectionAbortedError("the pull was cancelled")

    # What requests calls

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> tuple[Any, Any]:
        host, tls = super().build_connection_pool_key_attributes(request, True, None)
        if host["scheme"] == "https":
            tls["ssl_context"] = self._context(urlsplit(_url_of(request)).netloc)
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
        if scheme != "https" and not self._plain_http:
            raise TransportError(f"it leads to {scheme}://{host}, which is not HTTPS")
        response = super().send(
            request,
            stream=True,
            timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
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
        ca_file = self._ca_files.get(host)
        with self._lock:
            if ca_file not in self._contexts:
                # Takes some 30 ms, so it is made when it is first needed.
                system = str(_SYSTEM_CA_FILE) if _SYSTEM_CA_FILE.exists() else None
                context = ssl.create_default_context(cafile=system)
                if ca_file is not None:
                    try:
                        context.load_verify_locations(ca_file)
                    except OSError as error:  # ssl.SSLError too
                        raise TransportError(
                            f"CA file {ca_file} of {host}: {error.strerror}"
                        ) from error
                self._contexts[ca_file] = context
            return self._contexts[ca_file]


def _url_of(request: requests.PreparedRequest) -> str:
    # As types go it may be missing or bytes; in a request that is sent it is neither.
    assert isinstance(request.url, str)
    return request.url


def _tracking_pools(transport: Transport) -> dict[str, type[HTTPConnectionPool]]:
    class PlainConnection(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            transport.track(self.sock)

    class TlsConnection(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            transport.track(self.sock)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = PlainConnection

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = TlsConnection

    return {"http": PlainPool, "https": TlsPool}
