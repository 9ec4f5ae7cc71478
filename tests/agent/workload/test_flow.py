"""Slow readers: they lose bytes and are told so; nobody waits for them, and nothing grows."""

import gc
import os
import random
import signal
import socket
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
from agent.workload_sessions.ring import HEADER_BYTES, Ring
from protocol import FrameDecoder, GuestMessage, decode, workload
from tests.support.rounds import examples
from tests.support.workload import LINE_BYTES, Counted, Peer, Served, counting, open_peer

OUT, ERR = Stream.STDOUT, Stream.STDERR
LINES = 1_000_000


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


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
    before = resident_bytes()
    outboxes = [Outbox(number, nobody) for number in range(10)]
    for outbox in outboxes:
        for number in range(20_000):
            outbox.put(OUT if number % 2 else ERR, b"x")
        for _ in range(40):
            outbox.put(OUT, bytes(65536))
            outbox.put(ERR, bytes(65536))
    assert resident_bytes() - before < 10 * 2 * STREAM_BYTES
    assert resident_bytes() - before > 10 * 2 * STREAM_BYTES * 3 // 4
    for outbox in outboxes[:5]:
        while outbox.take() is not None:
            pass
    for outbox in outboxes[5:]:
        outbox.close()
    assert resident_bytes() - before < 2 * STREAM_BYTES


@given(
    size=st.integers(40, 200),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.binary(min_size=1, max_size=25)),
            st.tuples(st.just("extend"), st.binary(min_size=1, max_size=3)),
            st.tuples(st.just("take"), st.just(b"")),
        )
    ),
)
def test_a_ring_keeps_the_newest_bytes_in_their_pieces(
    size: int, steps: list[tuple[str, bytes]]
) -> None:
    ring = Ring(size)
    model: list[tuple[int, bytes]] = []

    def make_room(more: int) -> bool:
        excess = sum(HEADER_BYTES + len(data) for _, data in model) + more - size
        lost = excess > 0
        while excess > 0:
            number, data = model.pop(0)
            if len(data) > excess:
                model.insert(0, (number, data[excess:]))
            excess -= HEADER_BYTES + len(data)
        return lost

    for number, (step, data) in enumerate(steps):
        if step == "put":
            assert ring.put(number, data) == make_room(HEADER_BYTES + len(data))
            model.append((number, data))
        elif step == "extend" and model and len(model[-1][1]) + len(data) + HEADER_BYTES <= size:
            assert ring.extend(data) == make_room(len(data))
            newest, before = model[-1]
            model[-1] = (newest, before + data)
            assert ring.newest() == (newest, len(before + data))
        elif step == "take" and model:
            assert ring.first_number == model[0][0]
            assert ring.take() == model.pop(0)[1]
        assert ring.held_bytes == sum(HEADER_BYTES + len(data) for _, data in model)
    assert [ring.take() for _ in model] == [data for _, data in model]
    ring.close()


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
        busy, long, short, silent = (Outbox(number, nobody) for number in range(1, 5))
        for outbox, data in ((busy, b"b" * 60_000), (long, b"l" * 60_000), (short, b"short")):
            for _ in range(3):
                outbox.put(OUT, data)
                outgoing.ready(outbox)
        for outbox in (long, short, silent):
            outbox.end(workload.Exit(outbox.request_id, 0, "exited"))
            outgoing.ready(outbox)
        outgoing.say(workload.Error(request_id=7, message="no such id"))
        (_, *messages) = await told(stream, 12)
    # The first was under way already.
    assert [(type(each).__name__, getattr(each, "request_id", None)) for each in messages[:8]] == [
        ("Error", 7),
        ("Exit", 4),
        ("Stdout", 3),
        ("Exit", 3),
        ("Stdout", 2),
        ("Stdout", 2),
        ("Stdout", 2),
        ("Exit", 2),
    ]
    assert {each.request_id for each in messages[8:]} == {1, 99}  # type: ignore[union-attr]


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


async def test_a_reader_that_takes_a_little_now_and_then_holds_up_no_command(
    ports: Served, tmp_path: Path
) -> None:
    life, size, taken = tmp_path / "life", 64 << 20, 0
    os.mkfifo(life)

    async def trickle(stream: trio.abc.ReceiveStream) -> None:
        nonlocal taken
        while True:
            taken += len(await stream.receive_some(16 * 1024))
            await trio.sleep(0.005)

    async with open_peer(ports.address) as peer, trio.open_nursery() as nursery:
        await peer.shell(1, f"exec 9>{life}; head -c {size} /dev/zero")
        await peer.until(lambda: peer.told(1).started)
        nursery.start_soon(trickle, peer.client._frames.stream)
        with trio.fail_after(60):
            assert await trio.to_thread.run_sync(life.read_bytes, abandon_on_cancel=True) == b""
        assert taken < size // 2
        nursery.cancel_scope.cancel()


async def test_a_reader_that_keeps_up_loses_nothing_of_what_a_command_writes_at_once(
    peer: Peer, tmp_path: Path
) -> None:
    """It is never behind by more than the agent keeps."""
    fifo, burst, bursts = tmp_path / "fifo", 900 << 10, 15
    os.mkfifo(fifo)
    told = peer.told(1)
    # For reading, too: nobody has to be there yet.
    with fifo.open("r+b", buffering=0) as asking:
        await peer.shell(1, f"while read line; do head -c {burst} /dev/zero; done <{fifo}")
        for number in range(1, bursts + 1):
            asking.write(b"more\n")
            await peer.until(lambda number=number: len(told.stdout) == number * burst)
    assert (len(told.stdout), told.truncated) == (bursts * burst, 0)


async def test_what_waits_for_a_peer_is_gone_with_it(ports: Served, tmp_path: Path) -> None:
    life, commands = tmp_path / "life", 10
    os.mkfifo(life)
    # What is dropped for good has no need of being found by a collector first.
    gc.disable()
    try:
        async with open_peer(ports.address) as peer:
            with life.open("r+b", buffering=0) as over:
                before = resident_bytes()
                for number in range(commands):
                    await peer.shell(number, f"head -c 2M /dev/zero; echo >{life}")
                for _ in range(commands):
                    await trio.to_thread.run_sync(over.read, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert resident_bytes() - before > commands * STREAM_BYTES * 3 // 4
        await trio.testing.wait_all_tasks_blocked()
        assert resident_bytes() - before < commands * STREAM_BYTES // 4
    finally:
        gc.enable()


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
