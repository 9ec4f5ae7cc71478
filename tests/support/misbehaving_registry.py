"""A registry for one repository that can be told to misbehave, request by request."""

import json
import re
import socket
import ssl
import struct
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from attrs import define, field, frozen

from tests.support.layout import CONFIG, INDEX, MANIFEST, LayerBlob, digest_of

REPOSITORY = "test/image"


@frozen
class Request:
    """A request that the registry got; `path` is what stands after the repository, if it is there,
    with the query but for `ns`, which a mirror is told the registry's name in."""

    method: str
    path: str
    headers: Mapping[str, str]
    client: tuple[str, int]
    ns: str | None = None


class Exchange:
    """One request and its answer, as a fault sees it: `body` is what would be right."""

    def __init__(self, handler: "_Handler", content_type: str, body: bytes) -> None:
        self.headers = handler.headers
        self.registry = handler.registry
        self.content_type = content_type
        self.body = body
        self._handler = handler

    def start(self, status: int, length: int | None, **headers: str) -> None:
        """Send status line and headers; a header's name is written with underscores."""
        self._handler.send_response(status)
        for name, value in {"Content-Type": self.content_type, **headers}.items():
            self._handler.send_header(name.replace("_", "-"), value)
        if length is not None:
            self._handler.send_header("Content-Length", str(length))
        else:
            self._handler.close_connection = True
        self._handler.end_headers()

    def write(self, data: bytes) -> None:
        if self._handler.command != "HEAD":
            self._handler.wfile.write(data)
            self._handler.wfile.flush()

    def write_raw(self, data: bytes) -> None:
        """Send what no header went before."""
        self._handler.wfile.write(data)
        self._handler.wfile.flush()
        self._handler.close_connection = True

    def hang_up(self, *, reset: bool = False) -> None:
        """Close the connection, with what was announced not yet sent."""
        connection = self._handler.connection
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        else:
            connection.shutdown(socket.SHUT_RDWR)
        self._handler.close_connection = True

    def answer(self) -> None:
        """Answer as a good registry does, ranges included."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not asked:
            self.start(200, len(self.body), Docker_Content_Digest=digest_of(self.body))
            self.write(self.body)
            return
        first, size = int(asked[1]), len(self.body)
        if first >= size:
            self.start(416, 0)
            return
        self.start(206, size - first, Content_Range=f"bytes {first}-{size - 1}/{size}")
        self.write(self.body[first:])


Fault = Callable[[Exchange], None]


def status(code: int, body: object = b"", **headers: str) -> Fault:
    """Answer with a status; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def fault(exchange: Exchange) -> None:
        exchange.start(code, len(data), **headers)
        exchange.write(data)

    return fault


def redirect(url: str) -> Fault:
    return status(307, Location=url)


def cut(after: int, *, reset: bool = False) -> Fault:
    """End the connection after some bytes of the body."""

    def fault(exchange: Exchange) -> None:
        exchange.start(200, len(exchange.body))
        exchange.write(exchange.body[:after])
        exchange.hang_up(reset=reset)

    return fault


def short(length: int) -> Fault:
    """Answer as if the body were only so long."""
    return lambda exchange: _send(exchange, exchange.body[:length])


def flipped(exchange: Exchange) -> None:
    """Answer with one bit of the body's last byte changed."""
    _send(exchange, exchange.body[:-1] + bytes([exchange.body[-1] ^ 1]))


def longer(exchange: Exchange) -> None:
    _send(exchange, exchange.body + b"and more")


def rangeless(exchange: Exchange) -> None:
    """Answer with everything, whatever range was asked for."""
    _send(exchange, exchange.body)


def endless(exchange: Exchange) -> None:
    """Send for ever, until the client has had enough."""
    exchange.start(200, None)
    while True:
        exchange.write(exchange.body or b" " * 65536)


def stalled(after: int = 0) -> Fault:
    """Send so much of the body and then nothing, until the client or the test ends."""

    def fault(exchange: Exchange) -> None:
        exchange.start(200, len(exchange.body))
        exchange.write(exchange.body[:after])
        exchange.registry.stalled.set()
        exchange.registry.wait_for_release()
        exchange.hang_up()

    return fault


def silent(exchange: Exchange) -> None:
    """Do not answer at all."""
    exchange.registry.stalled.set()
    exchange.registry.wait_for_release()
    exchange.hang_up()


def slow(step: int, pause_s: float) -> Fault:
    """Send the body in steps with pauses between."""

    def fault(exchange: Exchange) -> None:
        exchange.start(200, len(exchange.body))
        for start in range(0, len(exchange.body), step):
            exchange.write(exchange.body[start : start + step])
            exchange.registry.released.wait(pause_s)

    return fault


def dripping(before: bytes, drop: bytes = b"x", pause_s: float = 0.05) -> Fault:
    """Send raw bytes, and then one drop after the other until the client has had enough."""

    def fault(exchange: Exchange) -> None:
        exchange.write_raw(before)
        while not exchange.registry.released.wait(pause_s):
            exchange.write_raw(drop)

    return fault


def flooding(before: bytes, wave: bytes) -> Fault:
    """Send raw bytes, and then the same again and again until the client has had enough."""

    def fault(exchange: Exchange) -> None:
        exchange.write_raw(before)
        waves = wave * (1 + 65536 // len(wave))
        while not exchange.registry.released.is_set():
            exchange.write_raw(waves)

    return fault


def _send(exchange: Exchange, body: bytes) -> None:
    exchange.start(200, len(body))
    exchange.write(body)


@define(eq=False)
class MisbehavingRegistry:
    """Serves what was added to it. Made by `misbehaving_registry`.

    Each fault of a path is used for one request, in order, after which the registry behaves.
    `stalled` is set once a fault waits. Where `authorization` is set, requests without that
    header's value are answered with 401 and `challenge`; `/token` gives `token` to anybody.
    """

    address: str
    requests: list[Request] = field(factory=list)
    stalled: threading.Event = field(factory=threading.Event)
    released: threading.Event = field(factory=threading.Event)
    authorization: str | None = None
    challenge: str = ""
    token: str = "a-token"
    _contents: dict[str, tuple[str, bytes]] = field(factory=dict)
    _faults: dict[str, deque[Fault]] = field(factory=lambda: defaultdict(deque))

    def reference(self, tag: str = "latest") -> str:
        return f"{self.address}/{REPOSITORY}:{tag}"

    def add_image(
        self,
        tag: str,
        layers: Sequence[LayerBlob],
        config: object | None = None,
        *,
        diff_ids: Sequence[str] | None = None,
    ) -> str:
        """Serve an image whose layers are as given; the manifest's digest."""
        document = config or {
            "created": "2024-02-29T12:00:00Z",
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/true"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": list(diff_ids or [layer.diff_id for layer in layers]),
            },
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add_blob(_json(document), CONFIG),
            "layers": [self.add_blob(layer.blob, layer.media_type) for layer in layers],
        }
        return self.add_manifest(tag, _json(manifest), MANIFEST)

    def add_blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        self._contents[f"blobs/{digest_of(data)}"] = ("application/octet-stream", data)
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    def add_manifest(self, tag: str, data: bytes, media_type: str) -> str:
        """Serve any bytes as a manifest, under a tag and its digest; the digest."""
        for target in (tag, digest_of(data)):
            self._contents[f"manifests/{target}"] = (media_type, data)
        return digest_of(data)

    def add_index(self, tag: str, manifests: Sequence[dict[str, Any]]) -> str:
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}
        return self.add_manifest(tag, _json(index), INDEX)

    def forget_all(self) -> None:
        """Have nothing any more."""
        self._contents.clear()

    def content(self, path: str) -> bytes:
        return self._contents[path][1]

    def misbehave(self, path: str, *faults: Fault) -> None:
        """`path` is `manifests/<tag or digest>` or `blobs/<digest>`."""
        self._faults[path].extend(faults)

    def requests_for(self, path: str, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if (r.path, r.method) == (path, method)]

    def release(self) -> None:
        """Let everything that waits end."""
        self.released.set()

    def wait_for_release(self) -> None:
        # Longer than any test runs.
        self.released.wait(300)

    def serve(self, handler: "_Handler") -> None:
        path = handler.path.partition(f"/v2/{REPOSITORY}/")[2] or handler.path
        path, _, ns = path.partition("?ns=")
        self.requests.append(
            Request(
                handler.command,
                path,
                dict(handler.headers),
                handler.client_address,
                unquote(ns) if ns else None,
            )
        )
        content_type, body = self._contents.get(path, ("text/plain", b""))
        if path.startswith("/token?"):
            path, content_type, body = "/token", "application/json", _json({"token": self.token})
        exchange = Exchange(handler, content_type, body)
        if self._faults[path]:
            self._faults[path].popleft()(exchange)
        elif path == "/token":
            exchange.answer()
        elif self.authorization and exchange.headers.get("Authorization") != self.authorization:
            errors = {"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}
            status(401, errors, WWW_Authenticate=self.challenge)(exchange)
        elif path in self._contents:
            exchange.answer()
        else:
            code = "MANIFEST_UNKNOWN" if path.startswith("manifests/") else "BLOB_UNKNOWN"
            status(404, {"errors": [{"code": code, "message": "not here"}]})(exchange)


class _Handler(BaseHTTPRequestHandler):
    registry: MisbehavingRegistry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            self.registry.serve(self)
        except OSError:
            self.close_connection = True  # the client had enough

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_CONNECT(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Not on the test's stderr."""


class _Server(ThreadingHTTPServer):
    # Connections that a client keeps open outlive the test by some moments.
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that is gone is no error; http.server meets it where it waits for a request.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextmanager
def misbehaving_registry(tls: ssl.SSLContext | None = None) -> Iterator[MisbehavingRegistry]:
    """Serve on loopback until the block is left, by HTTPS if a server's context is given."""

    class Handler(_Handler):
        pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        registry = MisbehavingRegistry(f"127.0.0.1:{server.server_port}")
        Handler.registry = registry
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield registry
        finally:
            registry.release()
            server.shutdown()
            thread.join()


def _json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
