"""The agent's ends of a command's pipes, and the command's, which outlives the agent."""

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from agent.processes.pipes import (
    LARGE_PIPE_BYTES,
    PIPE_BYTES,
    InputPipe,
    OutputPipe,
    adopt,
    input_pipe,
    output_pipe,
)

PATIENCE_S = 20


@pytest.fixture
def theirs() -> Iterator[ExitStack]:
    """What a command holds: closed when the test ends, if not before."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
async def output(theirs: ExitStack) -> AsyncIterator[tuple[OutputPipe, int]]:
    """The agent's end of an output pipe, and the command's."""
    with ExitStack() as ours:
        reading, writing = output_pipe(ours, theirs)
        ours.pop_all()
    pipe = OutputPipe(reading)
    yield pipe, writing
    pipe.close()


@pytest.fixture
async def stdin(theirs: ExitStack) -> AsyncIterator[tuple[InputPipe, int]]:
    """The agent's end of an input pipe, and the command's."""
    with ExitStack() as ours:
        writing, reading = input_pipe(ours, theirs)
        ours.pop_all()
    pipe = InputPipe(writing)
    yield pipe, reading
    pipe.close()


async def test_output_is_read_as_it_comes_up_to_its_end(
    output: tuple[OutputPipe, int], theirs: ExitStack
) -> None:
    pipe, command = output
    assert pipe.read() is None
    os.write(command, b"some")
    assert pipe.read(3) == b"som"
    assert await pipe.receive() == b"e"
    assert pipe.read() is None
    os.write(command, b"the last")
    theirs.close()
    assert (await pipe.receive(), await pipe.receive()) == (b"the last", b"")
    assert not pipe.is_open
    assert pipe.read() == b""
    await pipe.readable()
    pipe.close()


async def test_the_end_of_output_is_seen_once_the_last_process_has_it_no_more(
    output: tuple[OutputPipe, int], theirs: ExitStack
) -> None:
    pipe, command = output
    with sleeping(command, command):
        theirs.close()
        with trio.move_on_after(0.1):
            await pipe.receive()
            pytest.fail("a process still has it")
    with trio.fail_after(PATIENCE_S):
        assert await pipe.receive() == b""


async def test_a_command_that_writes_much_gets_a_larger_pipe(
    output: tuple[OutputPipe, int],
) -> None:
    pipe, command = output
    os.set_blocking(command, False)
    assert pipe.capacity_bytes == os.write(command, bytes(LARGE_PIPE_BYTES)) == PIPE_BYTES
    assert pipe.read() == bytes(PIPE_BYTES)
    assert pipe.capacity_bytes == os.write(command, bytes(LARGE_PIPE_BYTES)) == LARGE_PIPE_BYTES


async def test_a_command_outlives_the_end_of_its_reader(output: tuple[OutputPipe, int]) -> None:
    pipe, command = output
    pipe.close()
    # No SIGPIPE and no EPIPE: what fits is taken, and more would wait for the next agent.
    os.set_blocking(command, False)
    assert os.write(command, bytes(LARGE_PIPE_BYTES)) == PIPE_BYTES
    with pytest.raises(BlockingIOError):
        os.write(command, b"x")


async def test_the_next_agent_reads_what_the_last_one_left_unread(
    output: tuple[OutputPipe, int], theirs: ExitStack
) -> None:
    pipe, command = output
    os.write(command, b"one two")
    assert pipe.read(4) == b"one "
    with sleeping(command, command) as first, sleeping(subprocess.DEVNULL, command) as second:
        pipe.close()
        theirs.close()
        # One pipe, however many have it, and nothing else that they have.
        (adopted,) = adopt([first, second])
        assert await adopted.receive() == b"two"
    # The descriptors of one that has ended are passed over.
    assert adopt([first, second]) == []
    with trio.fail_after(PATIENCE_S):
        assert await adopted.receive() == b""


async def test_output_is_moved_to_a_file_as_it_is_read(
    output: tuple[OutputPipe, int], theirs: ExitStack, tmp_path: Path
) -> None:
    pipe, command = output
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    assert pipe.move(file, 100) is None
    os.write(command, b"one two three")
    assert pipe.move(file, 4) == 4
    assert pipe.move(file, 100) == 9
    assert pipe.move(file, 100) is None
    theirs.close()
    assert pipe.move(file, 100) == 0
    os.close(file)
    assert (tmp_path / "file").read_bytes() == b"one two three"


async def test_what_cannot_be_moved_is_still_there(
    output: tuple[OutputPipe, int], tmp_path: Path
) -> None:
    pipe, command = output
    os.write(command, b"kept")
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=r"No space left|Invalid argument"):
        pipe.move(full, 100)
    os.close(full)
    assert pipe.read() == b"kept"


async def test_input_waits_for_its_reader(stdin: tuple[InputPipe, int], theirs: ExitStack) -> None:
    pipe, command = stdin
    data = bytes(range(256)) * 20_000
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _feed() -> None:
                await pipe.send(data)
                await pipe.end()

            read = await trio.to_thread.run_sync(read_all, command)
    assert read == data
    assert not pipe.is_open
    await pipe.send(b"too late")
    await pipe.end()


async def test_input_is_dropped_where_nobody_can_read_it_any_more(
    stdin: tuple[InputPipe, int], theirs: ExitStack
) -> None:
    pipe, _ = stdin
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            # More than the pipe holds: it is being waited for when the reader closes.
            nursery.start_soon(pipe.send, bytes(5_000_000))
            await trio.testing.wait_all_tasks_blocked()
            theirs.close()
        await pipe.send(b"more")
    assert not pipe.is_open


async def test_all_descriptors_are_close_on_exec(
    output: tuple[OutputPipe, int], stdin: tuple[InputPipe, int]
) -> None:
    for descriptor in (output[1], stdin[1], output[0]._descriptor, stdin[0]._descriptor):
        assert not os.get_inheritable(descriptor)


@contextmanager
def sleeping(stdout: int, stderr: int) -> Iterator[int]:
    """A process that has these, for the block; its pid."""
    with subprocess.Popen(["sleep", "1000"], stdout=stdout, stderr=stderr) as child:
        try:
            yield child.pid
        finally:
            child.kill()


def read_all(descriptor: int) -> bytes:
    data = b""
    while more := os.read(descriptor, 1 << 20):
        data += more
    return data
