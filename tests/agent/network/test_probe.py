"""How far a URL is reached: real servers, and some that do not answer."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from agent.network.probe import Probe
from protocol.values import HttpRequest, NameResolution, TcpConnect
from tests.support.certificates import PrivateCa
from tests.support.http_server import http_server

PATIENCE_S = 20
NOT_TRIED = "not tried"


@contextmanager
def listener() -> Iterator[tuple[socket.socket, int]]:
    """A port that takes connections, which nobody looks after unless the test does."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server, server.getsockname()[1]


async def test_every_step_to_a_server_is_reported() -> None:
    with http_server() as port:
        report = await Probe().report(f"http://localhost:{port}/")
    assert report.ok
    assert report.dns.ok
    assert "127.0.0.1" in report.dns.addresses
    assert report.tcp == TcpConnect(True, report.tcp.duration_ms, None, f"127.0.0.1:{port}")
    assert report.http == HttpRequest(True, report.http.duration_ms, None, 200)


@pytest.mark.parametrize("status", [204, 301, 404, 503])
async def test_any_answer_tells_that_the_network_works(status: int) -> None:
    with http_server() as port:
        report = await Probe().report(f"http://127.0.0.1:{port}/{status}?a=b")
    assert (report.ok, report.http.status) == (True, status)


async def test_a_certificate_that_nobody_vouches_for_is_an_error(tmp_path: Path) -> None:
    context = PrivateCa(tmp_path).issue("127.0.0.1").context()
    with http_server(context) as port:
        report = await Probe().report(f"https://127.0.0.1:{port}/")
    assert report.tcp.ok
    assert "certificate verify failed" in str(report.http.error)


async def test_a_port_that_nobody_listens_on_is_an_error_of_tcp() -> None:
    with listener() as (server, port):
        server.close()
        report = await Probe().report(f"http://127.0.0.1:{port}/")
    assert report.dns == NameResolution(True, report.dns.duration_ms, None, ("127.0.0.1",))
    assert (report.tcp.ok, report.tcp.error) == (
        False,
        f"Connection refused: 127.0.0.1:{port}",
    )
    assert report.http == HttpRequest(False, 0, NOT_TRIED)
    assert not report.ok


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH\r\n", b""])
async def test_what_does_not_speak_http_is_an_error_of_http(said: bytes) -> None:
    async def talk(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(said)
        await stream.aclose()

    with listener() as (server, port):
        async with trio.open_nursery() as nursery:
            server.setblocking(False)
            accepting = trio.SocketListener(trio.socket.from_stdlib_socket(server))
            nursery.start_soon(trio.serve_listeners, talk, [accepting])
            report = await Probe().report(f"http://127.0.0.1:{port}/")
            nursery.cancel_scope.cancel()
    assert report.tcp.ok
    assert report.http.error is not None


async def test_a_server_that_is_silent_is_given_up_and_let_go() -> None:
    with listener() as (server, port):
        report = await Probe().report(f"http://127.0.0.1:{port}/", limit_s=2)
        assert report.tcp.ok
        assert str(report.http.error).startswith("no answer within ")
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            while connection.recv(1024):
                pass


async def test_who_asked_may_go_at_any_time() -> None:
    with listener() as (server, port):
        server.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Probe().report, f"http://127.0.0.1:{port}/")
            with trio.fail_after(PATIENCE_S):
                await trio.lowlevel.wait_readable(server)
                connection, _ = server.accept()
                with connection:
                    connection.setblocking(False)
                    await trio.lowlevel.wait_readable(connection)
                    assert connection.recv(1024).startswith(b"GET / HTTP/1.1\r\n")
                    nursery.cancel_scope.cancel()
                    with trio.CancelScope(shield=True):
                        await trio.lowlevel.wait_readable(connection)
                    assert connection.recv(1024) == b""


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "ftp://localhost/", "http://", "http:///x", "http://h:99999/", "http://[::1"],
)
async def test_what_is_no_url_is_an_error_and_nothing_is_tried(url: str) -> None:
    report = await Probe().report(url)
    assert str(report.dns.error).startswith("url: ")
    assert (report.ok, report.tcp.error, report.http.error) == (False, NOT_TRIED, NOT_TRIED)
