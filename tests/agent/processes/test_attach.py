"""Interactive runs below the wire: who waits for whom, and who does not."""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent.channel import Channel
from agent.connection import Connection
from agent.handlers.execution import converse
from agent.processes.attach import Receive, Send, attach
from agent.processes.command import Command
from agent.processes.outcome import Outcome
from agent.processes.process import Process, Stdio, Stream
from agent.processes.service import Processes
from agent.processes.terminal import Size
from protocol import encode, encode_frame, requests, responses
from tests.support.lifelines import lifeline

PATIENCE_S = 20
CHUNK_BYTES = 64 * 1024
MIB = 1024 * 1024

Output = list[tuple[Stream, bytes]]


async def silence() -> None:
    """A peer that says nothing."""
    await trio.sleep_forever()


def says(*messages: bytes | Size | None) -> Receive:
    """A peer that says this, and nothing more."""
    left = list(messages)

    async def receive() -> bytes | Size | None:
        await trio.lowlevel.checkpoint()
        if not left:
            await trio.sleep_forever()
        return left.pop(0)

    return receive


def heard_by(output: Output) -> Send:
    async def send(stream: Stream, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        output.append((stream, data))

    return send


async def deaf(stream: Stream, data: bytes) -> None:
    """A reader that takes nothing."""
    await trio.sleep_forever()


@asynccontextmanager
async def running(
    processes: Processes, script: str, *, terminal: bool = False
) -> AsyncIterator[Process]:
    command = Command.from_request(("sh", "-c", script))
    with trio.fail_after(PATIENCE_S):
        async with processes.running(
            command, Stdio(takes_stdin=True, terminal=terminal)
        ) as process:
            yield process


def joined(output: Output, stream: Stream = Stream.STDOUT) -> bytes:
    return b"".join(data for of, data in output if of is stream)


async def test_output_comes_in_chunks_each_stream_in_its_order(processes: Processes) -> None:
    output: Output = []
    script = "seq 1 200000 & seq 1 150000 >&2; wait; exit 3"
    async with running(processes, script) as process:
        outcome = await attach(process, heard_by(output), silence)
    assert outcome == Outcome(exit_code=3)
    assert joined(output).decode().split() == [str(n) for n in range(1, 200_001)]
    assert joined(output, Stream.STDERR).decode().split() == [str(n) for n in range(1, 150_001)]
    assert all(0 < len(data) <= CHUNK_BYTES for _, data in output)


async def test_one_chunk_is_sent_at_a_time(processes: Processes) -> None:
    sending: list[bytes] = []

    async def send(stream: Stream, data: bytes) -> None:
        assert not sending, "two chunks on one line"
        sending.append(data)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        sending.clear()

    script = "seq 1 50000 & seq 1 50000 >&2; wait"
    async with running(processes, script) as process:
        assert (await attach(process, send, silence)).exit_code == 0


async def test_input_arrives_in_its_order_and_its_end_ends_it(processes: Processes) -> None:
    output: Output = []
    async with running(processes, "cat") as process:
        receive = says(b"two ", b"", b"after the end", None)
        await attach(process, heard_by(output), receive, stdin_data="one ")
    assert joined(output) == b"one two "


async def test_a_peer_that_says_no_more_ends_the_input_and_not_the_output(
    processes: Processes,
) -> None:
    output: Output = []
    async with running(processes, "cat; sleep 0.1; echo late") as process:
        assert (await attach(process, heard_by(output), says(b"early ", None))).exit_code == 0
    assert joined(output) == b"early late\n"


async def test_input_and_output_of_megabytes_pass_each_other(processes: Processes) -> None:
    data = bytes(range(256)) * (4 * MIB // 256)
    output: Output = []
    async with running(processes, "cat") as process:
        assert (await attach(process, heard_by(output), says(data, data, None))).exit_code == 0
    assert joined(output) == data * 2


async def test_input_that_nobody_reads_does_not_hold_up_the_end(processes: Processes) -> None:
    async def receive() -> bytes:
        await trio.lowlevel.checkpoint()
        return b"x" * MIB

    begun = trio.current_time()
    async with running(processes, "sleep 0.2; exit 3") as process:
        assert (await attach(process, heard_by([]), receive)).exit_code == 3
    assert trio.current_time() - begun < 2


async def test_what_has_not_been_received_at_the_end_is_left_for_the_next(
    processes: Processes,
) -> None:
    say, receive = trio.open_memory_channel[bytes](10)
    async with running(processes, "read line") as process:
        await say.send(b"line\n")
        await attach(process, heard_by([]), receive.receive)
    say.send_nowait(b"for the next")
    assert receive.receive_nowait() == b"for the next"


async def test_a_command_waits_for_a_reader_that_does_not_read(
    processes: Processes, tmp_path: Path
) -> None:
    go = trio.Event()
    output: Output = []

    async def send(stream: Stream, data: bytes) -> None:
        await go.wait()
        await heard_by(output)(stream, data)

    with lifeline(tmp_path) as line:
        script = f"head -c 50000 /dev/zero; {line.script('head -c 20000000 /dev/zero')}"
        async with running(processes, script) as process, trio.open_nursery() as nursery:
            nursery.start_soon(attach, process, send, silence)
            await line.heard()
            # As much as a pipe holds, and nobody has taken any of it.
            assert line.is_held()
            assert output == []
            go.set()
            await line.ended()
    assert len(joined(output)) == 20_050_000


@pytest.mark.parametrize("terminal", [False, True])
async def test_a_time_limit_holds_while_nobody_reads(
    processes: Processes, tmp_path: Path, terminal: bool
) -> None:
    released = trio.Event()

    async def send(stream: Stream, data: bytes) -> None:
        await released.wait()

    with lifeline(tmp_path) as line:
        script = line.script("(setsid yes >&2 &); yes")
        async with running(processes, script, terminal=terminal) as process:
            outcomes = []

            async def run() -> None:
                outcomes.append(await attach(process, send, silence, timeout_s=0.3))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await line.heard()
                await line.ended()
                assert outcomes == []
                released.set()
    assert outcomes == [Outcome(exit_code=124, timed_out=True)]


async def test_a_time_limit_holds_even_while_nobody_hears_of_the_start(
    processes: Processes, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, lifeline(tmp_path) as line:
        channel = Channel(Connection(ours))
        filler = fill(ours)
        request = requests.VmExec(("sleep",), interactive=True, timeout_ms=300)
        async with running(processes, line.script("sleep 1000")) as process:
            answers = []

            async def run() -> None:
                answers.append(await converse(request, channel, process))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await line.heard()
                await line.ended()
                assert answers == []
                assert len(theirs.recv(filler, socket.MSG_WAITALL)) == filler
        assert answers == [responses.Exited(124, timed_out=True)]
        assert theirs.recv(1000) == encode_frame(encode(responses.Started()))


def fill(sender: socket.socket) -> int:
    """Send until the socket takes no more; how much it took."""
    count = 0
    while True:
        try:
            count += sender.send(bytes(1000), socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
    while True:
        try:
            count += sender.send(b"x", socket.MSG_DONTWAIT)
        except BlockingIOError:
            return count


async def test_all_that_was_written_before_the_end_comes_however_late(
    processes: Processes, tmp_path: Path
) -> None:
    go = trio.Event()
    output: Output = []

    async def send(stream: Stream, data: bytes) -> None:
        await go.wait()
        await heard_by(output)(stream, data)

    with lifeline(tmp_path) as line:
        # The reader holds the first of it, and the pipe the rest.
        script = line.script("echo first; sleep 0.1; seq 1 10000; seq 1 10000 >&2")
        async with running(processes, script) as process, trio.open_nursery() as nursery:
            nursery.start_soon(attach, process, send, silence)
            await line.heard()
            await line.ended()
            # Far beyond the patience with what a command leaves running.
            await trio.sleep(0.3)
            go.set()
    numbers = [str(n) for n in range(1, 10_001)]
    assert joined(output).decode().split() == ["first", *numbers]
    assert joined(output, Stream.STDERR).decode().split() == numbers


@pytest.mark.parametrize("left", ["sleep 1000", "yes", "yes >&2"])
async def test_what_holds_the_pipes_after_the_end_delays_it_by_a_moment_only(
    processes: Processes, tmp_path: Path, left: str
) -> None:
    output: Output = []
    with lifeline(tmp_path) as line:
        async with running(processes, line.script(f"{left} & echo out")) as process:
            begun = trio.current_time()
            assert (await attach(process, heard_by(output), silence)).exit_code == 0
            assert trio.current_time() - begun < 1
        assert b"out\n" in joined(output)
        await line.heard()
        assert line.is_held()


async def test_what_was_left_behind_sees_the_end_of_its_input(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        script = f"exec 3<&0; {line.script('cat <&3 >/dev/null & :')}"
        async with running(processes, script) as process:
            await attach(process, heard_by([]), says(b"some"))
        await line.heard()
        with trio.fail_after(PATIENCE_S):
            await line.ended()


class LineBrokenError(Exception):
    pass


def breaks_after(count: int) -> Callable[..., Awaitable[bytes]]:
    """A line that works so many times."""
    left = count

    async def use(*_: object) -> bytes:
        nonlocal left
        await trio.lowlevel.checkpoint()
        left -= 1
        if left < 0:
            raise LineBrokenError
        return b"some"

    return use


async def test_an_error_of_the_line_ends_it_and_the_whole_tree(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        script = line.script("setsid sleep 1000 & while :; do head -c 100000 /dev/zero; done")
        with pytest.RaisesGroup(LineBrokenError, flatten_subgroups=True):
            async with running(processes, script) as process:
                await attach(process, breaks_after(3), silence)
        assert line.is_let_go()
    (tmp_path / "2").mkdir()
    with lifeline(tmp_path / "2") as line:
        script = line.script("setsid sleep 1000 & cat >/dev/null")
        with pytest.RaisesGroup(LineBrokenError, flatten_subgroups=True):
            async with running(processes, script) as process:
                await attach(process, heard_by([]), breaks_after(3))
        assert line.is_let_go()


async def test_an_error_in_receiving_lets_the_chunk_pass_that_is_being_sent(
    processes: Processes,
) -> None:
    sent: list[str] = []
    in_the_middle, go = trio.Event(), trio.Event()

    async def send(stream: Stream, data: bytes) -> None:
        sent.append("begun")
        in_the_middle.set()
        await go.wait()
        sent.append("done")

    async def receive() -> bytes:
        await in_the_middle.wait()
        raise LineBrokenError

    with pytest.RaisesGroup(LineBrokenError, flatten_subgroups=True):
        async with running(processes, "yes & yes >&2") as process, trio.open_nursery() as nursery:
            nursery.start_soon(attach, process, send, receive)
            await in_the_middle.wait()
            await trio.testing.wait_all_tasks_blocked()
            go.set()
    # At most one of the other stream waited before it.
    assert sent in (["begun", "done"], ["begun", "done"] * 2)


async def test_a_cancellation_kills_the_tree_although_nobody_reads(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        async with trio.open_nursery() as connection:

            async def serve() -> None:
                async with running(processes, line.script("(setsid yes >&2 &); yes")) as process:
                    await attach(process, deaf, silence)

            connection.start_soon(serve)
            await line.heard()
            connection.cancel_scope.cancel()
        assert line.is_let_go()
