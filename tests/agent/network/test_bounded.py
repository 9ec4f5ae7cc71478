"""Listeners that serve only so many connections at a time."""

import logging
from pathlib import Path

import pytest
import trio

from agent.network.bounded import serve_bounded

PATIENCE_S = 20


async def test_a_connection_that_fails_is_logged_and_makes_room_for_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        if await stream.receive_some(1) == b"!":
            raise RuntimeError("a defect")
        await stream.send_all(b"served")

    path = str(tmp_path / "socket")
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(path)
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_bounded, "bridges", trio.SocketListener(listener), 1, serve)
        with trio.fail_after(PATIENCE_S):
            for said, heard in ((b"!", b""), (b"!", b""), (b"?", b"served")):
                async with await trio.open_unix_socket(path) as client:
                    await client.send_all(said)
                    assert await client.receive_some() == heard
        nursery.cancel_scope.cancel()
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in failures] == ["bridges: a connection failed"] * 2
