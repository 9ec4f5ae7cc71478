"""How long output is read after a process's end: all that lay there then, and little more."""

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import trio

from agent.processes.drain import Drain
from agent.processes.pipes import OutputPipe, output_pipe

PATIENCE_S = 20


class Written:
    """A pipe, its writing end, and what a drain has read of it."""

    def __init__(self, reading: int, writing: int) -> None:
        self.pipe = OutputPipe(reading)
        self.writing = writing

    async def rest(self, drain: Drain) -> bytes:
        """All that a drain reads until it is through with it."""
        data = b""
        with trio.fail_after(PATIENCE_S):
            while more := await drain.receive(self.pipe):
                data += more
        return data


@pytest.fixture
async def written() -> AsyncIterator[Written]:
    with ExitStack() as ours, ExitStack() as theirs:
        reading, writing = output_pipe(ours, theirs)
        ours.pop_all()
        one = Written(reading, writing)
        yield one
        one.pipe.close()


async def test_before_the_end_it_waits_for_as_long_as_it_takes(written: Written) -> None:
    drain = Drain()
    with trio.move_on_after(0.3) as waiting:
        await drain.receive(written.pipe)
    assert waiting.cancelled_caught
    os.write(written.writing, b"at last")
    assert await drain.receive(written.pipe) == b"at last"


async def test_what_others_hold_open_is_waited_for_less_than_100_ms(written: Written) -> None:
    drain = Drain()
    os.write(written.writing, b"before")
    begun = trio.current_time()
    drain.begin()
    assert await written.rest(drain) == b"before"
    assert 0.05 < trio.current_time() - begun < 0.5
    # For good, whatever comes then.
    os.write(written.writing, b"after")
    assert written.pipe.is_open


async def test_one_that_waits_already_waits_no_longer_than_that(written: Written) -> None:
    drain = Drain()
    ends = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _read() -> None:
            ends.append(await written.rest(drain))

        await trio.testing.wait_all_tasks_blocked()
        begun = trio.current_time()
        drain.begin()
    assert trio.current_time() - begun < 0.5
    assert ends == [b""]


async def test_what_comes_in_that_time_is_read(written: Written) -> None:
    drain = Drain()
    drain.begin()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _read() -> None:
            assert await written.rest(drain) == b"just in time"

        await trio.testing.wait_all_tasks_blocked()
        os.write(written.writing, b"just in time")


async def test_what_lay_there_at_the_end_is_read_however_late(written: Written) -> None:
    os.set_blocking(written.writing, False)
    drain = Drain()
    # Filled, then read once, upon which it is enlarged, and filled again.
    assert os.write(written.writing, bytes(1 << 20)) == 1 << 16
    assert len(await drain.receive(written.pipe)) == 1 << 16
    assert os.write(written.writing, b"x" * (1 << 20)) == 1 << 20
    drain.begin()
    # Far beyond the patience with others.
    await trio.sleep(0.3)
    assert await written.rest(drain) == b"x" * (1 << 20)


async def test_one_who_writes_without_end_is_not_read_without_end(written: Written) -> None:
    drain = Drain()
    read_bytes = 0
    with trio.fail_after(PATIENCE_S), writing_on_and_on(written.writing):
        assert await drain.receive(written.pipe)
        drain.begin()
        while data := await drain.receive(written.pipe):
            read_bytes += len(data)
            # A slow reader: whenever it comes, the pipe is full again.
            await trio.sleep(0.02)
    assert read_bytes <= written.pipe.capacity_bytes + (1 << 20)


@contextmanager
def writing_on_and_on(stdout: int) -> Iterator[None]:
    with subprocess.Popen(["yes"], stdout=stdout) as child:
        try:
            yield
        finally:
            child.kill()


async def test_the_end_of_all_writers_is_the_end_at_once() -> None:
    with ExitStack() as ours, ExitStack() as theirs:
        reading, writing = output_pipe(ours, theirs)
        ours.pop_all()
        written = Written(reading, writing)
        os.write(writing, b"all")
        theirs.close()
    drain = Drain()
    drain.begin()
    begun = trio.current_time()
    assert await written.rest(drain) == b"all"
    assert trio.current_time() - begun < 0.05
    assert not written.pipe.is_open


async def test_each_pipe_is_drained_for_itself() -> None:
    drain = Drain()
    with ExitStack() as ours, ExitStack() as theirs:
        ends = [output_pipe(ours, theirs) for _ in range(2)]
        ours.pop_all()
        pipes = [Written(*end) for end in ends]
        for one in pipes:
            os.write(one.writing, b"x" * 50_000)
        drain.begin()
        await trio.sleep(0.1)
        async with trio.open_nursery() as nursery:
            for one in pipes:
                nursery.start_soon(partial(is_drained, one, drain))
        for one in pipes:
            one.pipe.close()


async def is_drained(one: Written, drain: Drain) -> None:
    assert await one.rest(drain) == b"x" * 50_000
