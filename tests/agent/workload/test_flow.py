"""Slow readers: they lose bytes and are told so; nobody waits for them, and nothing grows."""

import os
import random
import signal
import socket
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from agent.connection import Connection
from agent.processes.process import Stream
from agent.workload_sessions.outbox import STREAM_BYTES, Outbox
from agent.workload_sessions.outgoing import Outgoing
from protocol import FrameDecoder, GuestMessage, decode, workload
from tests.support.rounds import examples
from tests.support.workload import LINE_BYTES, Counted, Peer, Served, counting, open_peer

OUT, ERR = Stream.STDOUT, Stream.STDERR
LINES = 1_000_000


def nobody() -> None:
    """Nobody is to be told."""


@given(
    writes=st.lists(
        st.tuples(st.sampled_from([OUT, ERR]), st.integers(1, 65536), st.integers(0, 3)),
        max_size=120,
    )
)
@examples(50, 1_000)
def test_an_outbox_loses_the_oldest_tells_of_it_and_keeps_the_order(
    writes: list[tuple[Stream, int, int]],
) -> None:
    chance = random.Random(1)
    outbox = Outbox(5, nobody)
    written = {OUT: b"", ERR: b""}
    read = {OUT: b"", ERR: b""}
    gaps = {OUT: 0, ERR: 0}

    def take() -> bool:
        message = outbox.take()
        if message is None:
            return False
        assert isinstance(message, workload.Stdout | workload.Stderr)
        stream = OUT if isinstance(message, workload.Stdout) else ERR
        if message.truncated:
            gaps[stream] += 1
            at = written[stream].index(message.data, len(read[stream]))
            assert at > len(read[stream])
            read[stream] = written[stream][:at]
        read[stream] += message.data
        assert written[stream].startswith(read[stream])
        return True

    for stream, size, takes in writes:
        data = chance.randbytes(size)
        written[stream] += data
        outbox.put(stream, data)
        for _ in range(takes):
            take()
    while take():
        pass
    assert read == written
    for stream in Stream:
        if len(written[stream]) < STREAM_BYTES // 2:
            assert gaps[stream] == 0


def test_an_outbox_holds_no_more_than_its_megabyte_a_stream_also_of_single_bytes() -> None:
    tracemalloc.start()
    try:
        outbox = Outbox(5, nobody)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(100_000):
            outbox.put(OUT if number % 2 else ERR, b"x")
        for _ in range(40):
            outbox.put(OUT, bytes(65536))
        assert tracemalloc.get_traced_memory()[0] - before < 2.5 * STREAM_BYTES
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def outgoing_to_nobody() -> AsyncIterator[tuple[Outgoing, trio.SocketStream]]:
    """What sends to a peer that has not read yet, its buffer being full."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        outgoing = Outgoing(Connection(ours))
        stalled = Outbox(99, nobody)
        for _ in range(16):
            stalled.put(OUT, bytes(60_000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outgoing.run)
            outgoing.ready(stalled)
            await trio.testing.wait_all_tasks_blocked()
            async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream:
                yield outgoing, stream
                nursery.cancel_scope.cancel()


async def told(stream: trio.SocketStream, count: int) -> list[GuestMessage]:
    decoder, messages = FrameDecoder(), []
    while len(messages) < count:
        decoder.receive_data(await stream.receive_some())
        while (payload := decoder.next_frame()) is not None:
            messages.append(decode(payload, GuestMessage).body)
    return messages


async def test_answers_and_ends_overtake_output_of_others_but_never_their_own() -> None:
    async with outgoing_to_nobody() as (outgoing, stream):
        busy, ended = Outbox(1, nobody), Outbox(2, nobody)
        for _ in range(3):
            busy.put(OUT, b"busy" * 5000)
            outgoing.ready(busy)
            ended.put(OUT, b"own" * 6000)
            outgoing.ready(ended)
        ended.end(workload.Exit(2, 0, "exited"))
        outgoing.ready(ended)
        outgoing.say(workload.Error(request_id=7, message="no such id"))
        (_, *messages) = await told(stream, 6)
    # The first was under way already.
    assert messages[0] == workload.Error(request_id=7, message="no such id")
    assert [type(message).__name__ for message in messages[1:5]] == ["Stdout"] * 3 + ["Exit"]
    assert all(message.request_id == 2 for message in messages[1:5])  # type: ignore[union-attr]


async def read_all(peer: Peer, request_id: int) -> Counted:
    """See a `counting` command to its end."""
    counted = Counted()
    while True:
        message = await peer.client.receive()
        match message:
            case workload.Stdout(of, data, truncated) if of == request_id:
                counted.feed(data, truncated=truncated)
            case workload.Exit(of, code, reason) if of == request_id:
                assert (code, reason) == (0, "exited")
                return counted


@pytest.mark.parametrize("way", ["exec", "run"])
async def test_a_reader_that_stalls_holds_up_no_command_and_is_told_what_it_lost(
    ports: Served, tmp_path: Path, way: str
) -> None:
    life = tmp_path / "life"
    os.mkfifo(life)
    async with open_peer(ports.address) as stalled:
        command = ("/bin/sh", "-c", 'exec 9>"$0"; exec "$@"', str(life), *counting(LINES))
        await (stalled.run(1, *command) if way == "run" else stalled.exec(1, *command))
        # The end of the FIFO is that of the command, which comes though nobody reads.
        with trio.fail_after(60):
            assert await trio.to_thread.run_sync(life.read_bytes, abandon_on_cancel=True) == b""
        with trio.fail_after(60):
            counted = await read_all(stalled, 1)
    assert counted.offset == LINES * LINE_BYTES
    assert counted.missing_bytes > 0


async def test_a_reader_that_keeps_up_loses_nothing_of_what_a_command_writes_at_once(
    peer: Peer,
) -> None:
    await peer.exec(1, *counting(LINES))
    with trio.fail_after(60):
        counted = await read_all(peer, 1)
    assert (counted.offset, counted.missing_bytes) == (LINES * LINE_BYTES, 0)


async def test_a_peer_that_does_not_read_its_answers_is_not_read_from_either(
    ports: Served,
) -> None:
    async with open_peer(ports.address) as peer:
        with trio.move_on_after(20) as patience:
            while True:
                # Blocks for good when both sockets' buffers are full.
                with trio.move_on_after(1):
                    await peer.signal(12345, signal.SIGTERM)
                    continue
                break
        assert not patience.cancelled_caught


async def test_a_signal_is_heard_and_an_end_told_while_others_output_waits(
    peer: Peer,
) -> None:
    await peer.exec(2, "sleep", "1000")
    await peer.until(lambda: peer.told(2).started)
    await peer.exec(1, "yes")
    await peer.until(lambda: len(peer.told(1).stdout) > 0)
    await peer.signal(2, signal.SIGTERM)
    assert (await peer.over(2)).exit == (143, "signaled: SIGTERM")
    assert not peer.told(1).is_over
