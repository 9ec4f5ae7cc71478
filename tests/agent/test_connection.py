"""Frames that are sent in pieces, as on vsock: large ones by a thread that waits for the peer."""

import socket
import threading
from collections.abc import Generator

import pytest
import trio
import trio.testing

from agent.channel import Channel
from agent.connection import THREADED_BYTES, Connection, PeerGone
from agent.errors import AgentError
from protocol import AgentResponse, encode, encode_frame, responses
from protocol.errors import ErrorCode

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


async def test_a_cancelled_send_waits_for_its_thread_to_be_done_with_what_it_sends() -> None:
    closed = threading.Event()

    def pieces() -> Generator[bytes]:
        try:
            while True:
                yield bytes(PIECE_BYTES)
        finally:
            closed.set()

    ours, theirs = socket.socketpair()
    with ours, theirs:
        with trio.fail_after(10), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Connection(ours, PIECE_BYTES).send_in_thread, pieces())
                await trio.lowlevel.wait_readable(theirs)
                scope.cancel()
        assert scope.cancelled_caught
        assert closed.is_set()


async def test_what_fails_between_two_frames_leaves_the_connection_usable() -> None:
    def answers() -> Generator[AgentResponse]:
        yield responses.DataChunk(PAYLOAD, done=False)
        raise AgentError(ErrorCode.FILE_IO_FAILED, "no more")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(Connection(ours, PIECE_BYTES))
        frame = encode_frame(encode(responses.DataChunk(PAYLOAD, done=False)))
        refusal = responses.Error("no more", "FILE_IO_FAILED")
        last = encode_frame(encode(refusal))

        async def say() -> None:
            with pytest.raises(AgentError, match="no more"):
                await channel.send_each(answers())
            await channel.send(refusal)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(say)
            size = len(frame) + len(last)
            heard = await trio.to_thread.run_sync(theirs.recv, size, socket.MSG_WAITALL)
        assert heard == frame + last


async def test_a_peer_that_goes_ends_a_large_send() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        closing = threading.Timer(0.1, theirs.close)
        closing.start()
        with trio.fail_after(10), pytest.raises(PeerGone):
            await Connection(ours, PIECE_BYTES).send(PAYLOAD)
        closing.join()
