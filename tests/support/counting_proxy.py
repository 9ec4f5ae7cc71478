"""A registry seen through a proxy that counts what it hands out, and knows when it was so much."""

import http.client
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from attrs import define, field

from initramfs.local_registry import LocalRegistry

# So that what was handed out is not far ahead of what was taken.
_STEP = 16 << 10
_SEND_BUFFER = 64 << 10
_PATIENCE_S = 30

_BLOB = re.compile(r"/v2/.+/blobs/(sha256:[0-9a-f]{64})")
_CARRIED = ("Accept", "Range", "User-Agent")
_ANSWERED = ("Content-Type", "Content-Length", "Content-Range", "Docker-Content-Digest")


@define(eq=False)
class CountingProxy:
    """A registry's proxy on loopback, made by `counting_proxy`.

    `served` has the bytes of each blob that clients were sent since the last `settle`, by digest.
    """

    address: str
    registry: LocalRegistry
    served: Counter[str] = field(factory=Counter)
    _lock: threading.Lock = field(factory=threading.Lock)
    _calm: threading.Condition = field(factory=threading.Condition)
    _under_way: int = 0
    _due_bytes: int | None = None
    _action: Callable[[], object] | None = None

    def reference(self, reference: str, host: str = "127.0.0.1") -> str:
        """The registry's reference as one of the proxy's, for a machine that calls it `host`."""
        port = self.address.rpartition(":")[2]
        return reference.replace(self.registry.address, f"{host}:{port}", 1)

    def settle(self) -> None:
        """Block until nothing is being sent any more, and count from 0 again."""
        with self._calm:
            assert self._calm.wait_for(lambda: self._under_way == 0, _PATIENCE_S)
        with self._lock:
            self.served.clear()
            self._due_bytes = None

    @contextmanager
    def sending(self) -> Iterator[None]:
        """For the block, something is being sent."""
        with self._calm:
            self._under_way += 1
        try:
            yield
        finally:
            with self._calm:
                self._under_way -= 1
                self._calm.notify_all()

    def when_served(self, total_bytes: int, action: Callable[[], object]) -> None:
        """Do something once, in between, when so many bytes of blobs were sent since `settle`."""
        with self._lock:
            self._due_bytes, self._action = total_bytes, action

    def count(self, digest: str, sent_bytes: int) -> None:
        with self._lock:
            self.served[digest] += sent_bytes
            if self._due_bytes is None or self.served.total() < self._due_bytes:
                return
            self._due_bytes, action = None, self._action
        assert action is not None
        action()


class _Handler(BaseHTTPRequestHandler):
    proxy: CountingProxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with self.proxy.sending():
            self._pass_on()

    def do_HEAD(self) -> None:
        self.do_GET()

    def _pass_on(self) -> None:
        upstream = http.client.HTTPConnection(self.proxy.registry.address)
        try:
            headers = {name: self.headers[name] for name in _CARRIED if name in self.headers}
            upstream.request(self.command, self.path, headers=headers)
            answer = upstream.getresponse()
            self.send_response(answer.status)
            for name in _ANSWERED:
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            blob = _BLOB.fullmatch(self.path)
            while data := answer.read(_STEP):
                self.wfile.write(data)
                if blob is not None:
                    self.proxy.count(blob[1], len(data))
        except OSError:
            self.close_connection = True  # the client had enough, or died
        finally:
            upstream.close()

    def log_message(self, format: str, *args: object) -> None:
        """Not on the test's stderr."""


class _Server(ThreadingHTTPServer):
    # Connections that a client keeps open outlive the test by some moments.
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        # Inherited by what is accepted.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that is gone is no error; http.server meets it where it waits for a request.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextmanager
def counting_proxy(registry: LocalRegistry) -> Iterator[CountingProxy]:
    """Serve until the block is left."""

    class Handler(_Handler):
        pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        proxy = CountingProxy(f"127.0.0.1:{server.server_port}", registry)
        Handler.proxy = proxy
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
