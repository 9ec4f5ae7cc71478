"""Frames that are sent in pieces, as on vsock: large ones by a thread that waits for the peer."""

import socket
import threading

import pytest
import trio
import trio.testing

from agent.connection import THREADED_BYTES, Connection, PeerGone
from protocol import encode_frame

PIECE_BYTES = 32 * 1024
PAYLOAD = bytes(range(256)) * (8 * THREADED_BYTES // 256)


async def test_a_large_frame_arrives_whole_at_a_peer_that_reads_late() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours, PIECE_BYTES)
        frame = encode_frame(PAYLOAD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send, PAYLOAD)
            await trio.testing.wait_all_tasks_blocked()
            heard = await trio.to_thread.run_sync(theirs.recv, len(frame), socket.MSG_WAITALL)
        assert heard == frame


async def test_a_cancelled_send_ends_its_thread_and_the_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours, PIECE_BYTES)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.send, PAYLOAD)
                await trio.lowlevel.wait_readable(theirs)
                scope.cancel()
        heard = b""
        with trio.fail_after(10):
            while data := await trio.to_thread.run_sync(theirs.recv, 1 << 20):
                heard += data
        # Half a frame, and then the end.
        assert 0 < len(heard) < len(PAYLOAD)
        with pytest.raises(PeerGone):
            await connection.send(b"more")


async def test_a_peer_that_goes_ends_a_large_send() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        closing = threading.Timer(0.1, theirs.close)
        closing.start()
        with trio.fail_after(10), pytest.raises(PeerGone):
            await Connection(ours, PIECE_BYTES).send(PAYLOAD)
        closing.join()
