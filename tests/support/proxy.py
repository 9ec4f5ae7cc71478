"""An HTTP proxy: it forwards requests for http:// URLs, and makes tunnels for the others."""

import base64
import http.client
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from attrs import define, field

_HOP_BY_HOP = {"proxy-authorization", "proxy-connection", "connection", "transfer-encoding"}


@define(eq=False)
class Proxy:
    """`requests` are the methods and targets that it got.

    `resolve` maps `HOST:PORT` of a tunnel to where it leads in truth. Where `credentials` are set
    (`user:password`), everybody else gets a 407.
    """

    address: str
    credentials: str | None = None
    resolve: dict[str, str] = field(factory=dict)
    requests: list[str] = field(factory=list)


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy

    def do_GET(self) -> None:
        if not self._admit():
            return
        url = urlsplit(self.path)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        upstream = http.client.HTTPConnection(url.netloc, timeout=10)
        upstream.request(self.command, url._replace(scheme="", netloc="").geturl(), None, headers)
        answer = upstream.getresponse()
        self.send_response(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())
        upstream.close()
        self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_CONNECT(self) -> None:
        if not self._admit():
            return
        host, _, port = self.proxy.resolve.get(self.path, self.path).rpartition(":")
        try:
            upstream = socket.create_connection((host, int(port)), timeout=10)
        except OSError:
            self.send_error(503)
            return
        self.send_response(200, "Connection established")
        self.end_headers()
        with upstream:
            _pump(self.connection, upstream)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Not on the test's stderr."""

    def _admit(self) -> bool:
        self.proxy.requests.append(f"{self.command} {self.path}")
        credentials = self.proxy.credentials
        wanted = f"Basic {base64.b64encode((credentials or '').encode()).decode()}"
        if credentials is None or self.headers.get("Proxy-Authorization") == wanted:
            return True
        self.send_response(407, "Proxy Authentication Required")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False


@contextmanager
def http_proxy(tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """Serve on loopback until the block is left; itself by TLS if a server's context is given."""

    class Handler(_Handler):
        pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that is gone is no error."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        Handler.proxy = Proxy(f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield Handler.proxy
        finally:
            server.shutdown()
            thread.join()


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until one side ends."""
    peers = {one: other, other: one}
    while True:
        pending = isinstance(one, ssl.SSLSocket) and one.pending() > 0
        ready = [one] if pending else select.select([one, other], [], [], 30)[0]
        for source in ready:
            data = source.recv(65536)
            if not data:
                return
            peers[source].sendall(data)
        if not ready:
            return
