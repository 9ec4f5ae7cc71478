"""`innkeep run` and `innkeep exec` joined to an interactive command, without a terminal."""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol import AgentResponse, requests, responses
from tests.protocol.fake_agent import Peer, serving
from tests.protocol.sessions import (
    CHUNK_SIZE,
    all_input,
    begin,
    command,
    in_conversation,
    offset,
    pattern,
    run_innkeep,
    session,
    some_input,
    start_innkeep,
)

MIB = 1024 * 1024
EXITED = responses.Exited(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@contextmanager
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """The two ends of a pipe; closed after the block, where the test has not done so."""
    reading, writing = os.pipe()
    with FileIO(reading, "r") as reader, FileIO(writing, "w") as writer:
        yield reader, writer


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of anything that has a path."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@asynccontextmanager
async def running(address: str, *arguments: str, **options: Any) -> AsyncIterator[trio.Process]:
    """`innkeep` with pipes for all of its streams, except where `options` name others."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = await start_innkeep(address, *arguments, **{**pipes, **options})
    try:
        yield process
    finally:
        process.kill()
        await process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                await stream.aclose()


async def everything(stream: trio.abc.ReceiveStream | None) -> bytes:
    """What comes from a process until it closes its end."""
    assert stream is not None
    return b"".join([data async for data in stream])


# Output


@pytest.mark.parametrize("arguments", [["exec", "x"], ["run", "alpine"]])
async def test_output_comes_out_as_it_comes(path: Path, arguments: list[str]) -> None:
    seen = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(responses.Stdout(b"first, without a newline"))
        await seen.wait()
        await peer.send(responses.Stdout(b"last"), EXITED)
        await peer.receive()

    async with serving(path, conversation) as address, running(address, *arguments) as process:
        assert process.stdout is not None
        assert await process.stdout.receive_some() == b"first, without a newline"
        seen.set()
        assert await everything(process.stdout) == b"last"
        assert await process.wait() == 0


async def test_output_and_error_output_keep_their_order_and_their_places(path: Path) -> None:
    lines = [
        (responses.Stderr if n % 3 == 0 else responses.Stdout)(b"%d\n" % n) for n in range(300)
    ]
    conversation = session(*lines, EXITED)
    arguments = ("exec", "x")
    apart = await in_conversation(path, conversation, *arguments)
    assert apart.stdout == b"".join(b"%d\n" % n for n in range(300) if n % 3)
    assert apart.stderr == b"".join(b"%d\n" % n for n in range(0, 300, 3))

    async with serving(path.with_name("again.sock"), conversation) as address:
        together = await trio.run_process(
            command(address, *arguments), capture_stdout=True, stderr=subprocess.STDOUT
        )
    assert together.stdout == b"".join(b"%d\n" % n for n in range(300))


async def test_output_of_any_bytes_and_size_is_what_the_command_wrote(path: Path) -> None:
    data = pattern(8 * MIB + 1)
    pieces = [data[start : start + CHUNK_SIZE] for start in range(0, len(data), CHUNK_SIZE)]
    answers = [responses.Stdout(piece) for piece in pieces]
    result = await in_conversation(path, session(*answers, EXITED), "exec", "x")
    assert result.stdout == data


@pytest.mark.parametrize("exit_code", [0, 1, 124, 137, 255])
async def test_it_exits_as_the_command_did(path: Path, exit_code: int) -> None:
    conversation = session(responses.Exited(exit_code))
    result = await in_conversation(path, conversation, "exec", "x")
    assert (result.returncode, result.stdout, result.stderr) == (exit_code, b"", b"")


async def test_a_reader_that_goes_away_ends_the_command(path: Path) -> None:
    reader_is_gone, hung_up = trio.Event(), trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(responses.Stdout(b"y\n"))
        await reader_is_gone.wait()
        await peer.send(responses.Stdout(b"y\n"))
        assert await peer.receive() == requests.Stdin(b"")
        assert await peer.receive() is None
        hung_up.set()

    async with serving(path, conversation) as address, running(address, "exec", "yes") as process:
        assert process.stdout is not None
        assert await process.stdout.receive_some() == b"y\n"
        await process.stdout.aclose()
        reader_is_gone.set()
        await hung_up.wait()
        assert await everything(process.stderr) == b""
        assert await process.wait() == 1


async def test_output_that_cannot_be_written_is_one_line(path: Path) -> None:
    conversation = session(responses.Stdout(b"x"), EXITED)
    with opened(Path("/dev/full"), os.O_WRONLY) as full:
        result = await in_conversation(path, conversation, "exec", "x", stdout=full)
    assert result.returncode == 1
    assert result.stderr == b"innkeep: cannot write the output: No space left on device\n"


async def test_streams_that_were_closed_before_are_no_harm(path: Path) -> None:
    conversation = session(responses.Stdout(b"x"), responses.Stderr(b"e"), responses.Exited(3))
    async with serving(path, conversation) as address:
        shell = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command(address, "exec", "-i", "x")]
        result = await trio.run_process(shell, capture_stderr=True, check=False)
    assert (result.returncode, result.stderr) == (3, b"e")


async def test_a_stalled_reader_stalls_neither_input_nor_an_interrupt(path: Path) -> None:
    heard = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(responses.Stdout(bytes(MIB)))
        assert await some_input(peer, 5) == b"hello"
        heard.set()
        assert await peer.receive() is None

    async with (
        serving(path, conversation) as address,
        running(address, "exec", "-i", "x") as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        # From here on nobody reads: more is on its way than a pipe takes.
        assert await process.stdout.receive_some(1) == b"\0"
        await process.stdin.send_all(b"hello")
        await heard.wait()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130


# Input


@pytest.mark.parametrize("arguments", [["exec", "cat"], ["run", "alpine"], ["exec", "-t", "cat"]])
async def test_without_i_the_commands_input_is_at_its_end_at_once(
    path: Path, arguments: list[str]
) -> None:
    heard: list[object] = []

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        heard.append(await peer.receive())
        await peer.send(EXITED)
        heard.append(await peer.receive())

    with pipe() as (reading, writing):
        writing.write(b"for someone else")
        result = await in_conversation(path, conversation, *arguments, stdin=reading)
        assert reading.read(100) == b"for someone else"
    assert result.returncode == 0
    assert heard == [requests.Stdin(b""), None]


async def test_with_i_input_goes_out_as_it_comes_until_its_end(path: Path) -> None:
    pieces: list[bytes] = []
    came = [trio.Event(), trio.Event()]

    async def take(piece: bytes) -> None:
        pieces.append(piece)
        came[len(pieces) - 1].set()

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        assert await all_input(peer, take) == b"one\0two"
        await peer.send(responses.Exited(7))

    async with (
        serving(path, conversation) as address,
        running(address, "exec", "-i", "cat") as process,
    ):
        assert process.stdin is not None
        for piece, event in zip((b"one\0", b"two"), came, strict=True):
            await process.stdin.send_all(piece)
            await event.wait()
        assert pieces == [b"one\0", b"two"]
        await process.stdin.aclose()
        assert await process.wait() == 7


@pytest.mark.parametrize("arguments", [["exec", "-i", "cat"], ["run", "--interactive", "alpine"]])
@pytest.mark.parametrize("kind", ["pipe", "file", "nothing"])
@pytest.mark.parametrize("size", [0, 1, 5 * MIB + 3])
async def test_input_of_any_kind_and_size_comes_back_from_cat(
    path: Path, tmp_path: Path, arguments: list[str], kind: str, size: int
) -> None:
    data = b"" if kind == "nothing" else pattern(size)

    async def cat(peer: Peer) -> None:
        await begin(peer)
        assert await all_input(peer, lambda piece: peer.send(responses.Stdout(piece))) == data
        await peer.send(EXITED)

    if kind == "pipe":
        result = await in_conversation(path, cat, *arguments, stdin=data)
    else:
        (tmp_path / "file").write_bytes(data)
        with opened(tmp_path / "file" if kind == "file" else Path(os.devnull)) as source:
            result = await in_conversation(path, cat, *arguments, stdin=source)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == data


async def test_input_that_someone_made_non_blocking_is_waited_for(path: Path) -> None:
    started = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        started.set()
        assert await all_input(peer) == b"late"
        await peer.send(EXITED)

    with pipe() as (reading, writing):
        os.set_blocking(reading.fileno(), False)
        async with (
            serving(path, conversation) as address,
            running(address, "exec", "-i", "cat", stdin=reading) as process,
        ):
            await started.wait()
            writing.write(b"late")
            writing.close()
            assert await process.wait() == 0


async def test_a_command_that_does_not_read_its_input_stalls_ours(
    path: Path, tmp_path: Path
) -> None:
    (tmp_path / "huge").write_bytes(b"")
    os.truncate(tmp_path / "huge", 1024 * MIB)
    ended = trio.Event()

    async def conversation(peer: Peer) -> None:
        assert await begin(peer) is not None
        assert await some_input(peer, 1)
        await peer.send(responses.Stdout(b"enough"), responses.Exited(9))
        await ended.wait()

    with opened(tmp_path / "huge") as file:
        async with serving(path, conversation) as address:
            result = await run_innkeep(address, "exec", "-i", "true", stdin=file)
            ended.set()
        assert (result.returncode, result.stdout) == (9, b"enough")
        assert offset(file) < 16 * MIB


async def test_input_that_never_ends_does_not_hold_up_the_end(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await begin(peer)
        assert await some_input(peer, 5) == b"hello"
        await peer.send(responses.Exited(4))

    with pipe() as (reading, writing):
        writing.write(b"hello")
        result = await in_conversation(path, conversation, "exec", "-i", "head", stdin=reading)
    assert (result.returncode, result.stderr) == (4, b"")


async def test_input_that_cannot_be_read_is_one_line_and_not_an_end(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await begin(peer)
        assert await peer.receive() is None

    # Opened for writing only.
    with opened(Path(os.devnull), os.O_WRONLY) as unreadable:
        result = await in_conversation(path, conversation, "exec", "-i", "cat", stdin=unreadable)
    assert result.returncode == 1
    assert result.stderr == b"innkeep: cannot read the input: Bad file descriptor\n"


# Ends


@pytest.mark.parametrize("arguments", [["exec", "x"], ["exec", "-i", "x"], ["run", "alpine"]])
async def test_an_agent_that_hangs_up_in_the_middle_is_one_line(
    path: Path, arguments: list[str]
) -> None:
    async def conversation(peer: Peer) -> None:
        await begin(peer)
        if "-i" not in arguments:
            assert await peer.receive() == requests.Stdin(b"")
        await peer.send(responses.Stdout(b"so far"))

    with pipe() as (reading, _):
        async with serving(path, conversation) as address:
            result = await run_innkeep(address, *arguments, stdin=reading)
    assert (result.returncode, result.stdout) == (125, b"so far")
    expected = f"innkeep: {address}: the agent hung up before its answer\n"
    assert result.stderr.decode() == expected


async def test_what_an_agent_says_before_it_hangs_up_is_heard(path: Path, tmp_path: Path) -> None:
    answers: list[AgentResponse] = [responses.Stdout(b"%d\n" % n) for n in range(1000)]

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await some_input(peer, 1)
        # Input is still on its way, and finds nobody.
        await peer.send(*answers, responses.Exited(5))

    (tmp_path / "input").write_bytes(bytes(4 * MIB))
    with opened(tmp_path / "input") as file:
        result = await in_conversation(path, conversation, "exec", "-i", "x", stdin=file)
    assert (result.returncode, result.stderr) == (5, b"")
    assert result.stdout == b"".join(b"%d\n" % n for n in range(1000))


@pytest.mark.parametrize("arguments", [["exec", "x"], ["exec", "-i", "x"], ["run", "-t", "a"]])
async def test_an_interrupt_hangs_up_on_a_running_command(path: Path, arguments: list[str]) -> None:
    hung_up = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(responses.Stdout(b"up"))
        while await peer.receive() is not None:
            pass
        hung_up.set()

    async with serving(path, conversation) as address, running(address, *arguments) as process:
        assert process.stdout is not None
        assert await process.stdout.receive_some() == b"up"
        process.send_signal(signal.SIGINT)
        await hung_up.wait()
        assert await process.wait() == 130
        assert await everything(process.stderr) == b""


@pytest.mark.parametrize("arguments", [["exec", "-it", "sh"], ["run", "-i", "--tty", "alpine"]])
async def test_input_that_is_no_terminal_cannot_be_one_for_the_command(
    path: Path, arguments: list[str]
) -> None:
    # No agent is asked.
    with opened(Path(os.devnull)) as nothing:
        result = await run_innkeep(f"unix:{path}", *arguments, stdin=nothing)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"innkeep: the input device is not a TTY\n"


async def test_a_terminal_for_the_command_alone_needs_none_here(path: Path) -> None:
    heard: list[object] = []

    async def conversation(peer: Peer) -> None:
        heard.append(await begin(peer))
        heard.append(await peer.receive())
        await peer.send(responses.Stdout(b"\x1b[1mx\r\n"), EXITED)

    with opened(Path(os.devnull)) as nothing:
        result = await in_conversation(path, conversation, "exec", "-t", "ls", stdin=nothing)
    assert heard == [requests.VmExec(("ls",), interactive=True, tty=True), requests.Stdin(b"")]
    assert (result.returncode, result.stdout) == (0, b"\x1b[1mx\r\n")
