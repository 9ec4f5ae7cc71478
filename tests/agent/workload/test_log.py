"""The workload's log: nothing of it is lost or told twice but what its size makes it forget."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.processes.process import Stream
from agent.workload.log import Reader, WorkloadLog, opened_log

OUT, ERR = Stream.STDOUT, Stream.STDERR
SIZE = 256 * 1024


@pytest.fixture
def log(tmp_path: Path) -> Iterator[WorkloadLog]:
    with opened_log(tmp_path / "log", SIZE) as opened:
        yield opened


class Writer:
    """A workload's end of a log's FIFOs."""

    def __init__(self, log: WorkloadLog) -> None:
        self.log = log
        self.files = {
            stream: os.open(log.fifo(stream), os.O_RDWR | os.O_NONBLOCK) for stream in Stream
        }

    def write(self, stream: Stream, data: bytes) -> None:
        """Write all of it, with the log taking it in between."""
        left = memoryview(data)
        while left:
            left = left[os.write(self.files[stream], left[:65536]) :]
            self.log.drain()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            os.close(file)


def nobody() -> None:
    """Somebody who reads without being told."""


def rest(reader: Reader) -> list[tuple[Stream, bytes, bool]]:
    chunks = []
    while (chunk := reader.read()) is not None:
        chunks.append(chunk)
    return chunks


def text(chunks: list[tuple[Stream, bytes, bool]], stream: Stream) -> bytes:
    return b"".join(data for each, data, _ in chunks if each is stream)


def test_a_reader_gets_both_streams_in_the_order_of_their_arrival(log: WorkloadLog) -> None:
    with Writer(log) as writer:
        for number in range(20):
            writer.write(OUT, b"out %d\n" % number)
            writer.write(ERR, b"err %d\n" % number)
    chunks = rest(log.reader(nobody))
    assert b"".join(data for _, data, _ in chunks) == b"".join(
        b"out %d\nerr %d\n" % (number, number) for number in range(20)
    )
    assert not any(truncated for _, _, truncated in chunks)


def test_a_reader_is_told_of_growth_and_reads_what_was_added_to_a_record(log: WorkloadLog) -> None:
    told: list[None] = []
    reader = log.reader(lambda: told.append(None))
    with Writer(log) as writer:
        writer.write(OUT, b"one ")
        assert rest(reader) == [(OUT, b"one ", False)]
        writer.write(OUT, b"two ")
        writer.write(OUT, b"three")
    assert rest(reader) == [(OUT, b"two three", False)]
    assert len(told) == 3
    reader.close()
    with Writer(log) as writer:
        writer.write(OUT, b"four")
    assert len(told) == 3


def test_the_log_begins_with_its_last_bytes_and_says_that_some_went_before(
    log: WorkloadLog,
) -> None:
    written = random.Random(1).randbytes(3 * SIZE + 12345)
    with Writer(log) as writer:
        writer.write(OUT, written)
    chunks = rest(log.reader(nobody))
    assert text(chunks, OUT) == written[-SIZE:]
    assert [truncated for _, _, truncated in chunks] == [True] + [False] * (len(chunks) - 1)


def test_a_reader_that_is_left_behind_goes_on_with_what_is_kept_and_is_told(
    log: WorkloadLog,
) -> None:
    slow = log.reader(nobody)
    written = random.Random(2).randbytes(3 * SIZE)
    with Writer(log) as writer:
        writer.write(OUT, b"seen")
        writer.write(ERR, b"error")
        assert rest(slow) == [(OUT, b"seen", False), (ERR, b"error", False)]
        writer.write(OUT, written)
    (first, *others) = rest(slow)
    # Nothing of stderr was lost to it.
    assert first[2]
    assert not any(truncated for _, _, truncated in others)
    assert written.endswith(text([first, *others], OUT))
    assert slow.has_read_until(log.written)


def test_a_reader_that_reads_until_a_point_gets_nothing_of_what_came_later(
    log: WorkloadLog,
) -> None:
    reader = log.reader(nobody)
    with Writer(log) as writer:
        writer.write(ERR, b"error")
        writer.write(OUT, b"one")
        until = log.written
        # Of the next run, and yet in the same record.
        writer.write(OUT, b"two")
        writer.write(ERR, b"more")
    assert reader.read(until) == (ERR, b"error", False)
    assert reader.read(until) == (OUT, b"one", False)
    assert reader.has_read_until(until)
    assert reader.read(until) is None
    assert rest(reader) == [(OUT, b"two", False), (ERR, b"more", False)]


def test_a_live_reader_begins_with_what_is_written_from_then_on(log: WorkloadLog) -> None:
    with Writer(log) as writer:
        writer.write(OUT, b"before ")
        reader = log.reader(nobody, live=True)
        assert reader.read() is None
        writer.write(OUT, b"after")
    assert rest(reader) == [(OUT, b"after", False)]


def test_single_bytes_of_alternating_streams_take_no_more_room_than_twice_the_size(
    tmp_path: Path,
) -> None:
    size = 64 * 1024
    with opened_log(tmp_path / "log", size) as log, Writer(log) as writer:
        for number in range(40_000):
            writer.write(OUT if number % 2 else ERR, b"%d" % (number % 10))
        parts = [path for path in log.directory.iterdir() if path.is_file()]
        assert sum(path.stat().st_size for path in parts) <= 2.2 * size
        assert len(text(rest(log.reader(nobody)), OUT)) > 5_000


def test_the_next_agent_goes_on_with_the_log(tmp_path: Path) -> None:
    written = random.Random(3).randbytes(2 * SIZE)
    with opened_log(tmp_path / "log", SIZE) as log:
        writer = Writer(log)
        writer.write(OUT, written)
        # Unread when the agent dies; the workload holds the FIFO open.
        os.write(writer.files[OUT], b"in between")
    with writer, opened_log(tmp_path / "log", SIZE) as log:
        log.drain()
        chunks = rest(log.reader(nobody))
        assert text(chunks, OUT) == (written + b"in between")[-SIZE:]
        assert chunks[0][2]
        assert log.written == {OUT: len(written) + 10, ERR: 0}


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("output", [b"", b"what came\x01\x00\x00\x00 meanwhile"])
def test_an_agent_that_died_in_the_middle_of_a_record_loses_nothing(
    tmp_path: Path, *, extended: bool, output: bytes
) -> None:
    with opened_log(tmp_path / "log", SIZE) as log, Writer(log) as writer:
        writer.write(OUT, b"first")
        (path,) = (path for path in log.directory.iterdir() if path.is_file())
        content = path.read_bytes()
    header = b"\x01\x00\x00\x00\xff\xff\xff\xff"
    if extended:
        path.write_bytes(header + content[8:] + output)
    else:
        path.write_bytes(content + header + output)
    with opened_log(tmp_path / "log", SIZE) as log, Writer(log) as writer:
        writer.write(OUT, b" last")
        assert text(rest(log.reader(nobody)), OUT) == b"first" + output + b" last"
