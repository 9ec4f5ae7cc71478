"""The workload's output: both streams in the order of their arrival, bounded, kept in files.

    stdout, stderr      FIFOs that the workload writes to; it holds them open for reading too
    <n>.<out>.<err>     the n-th part of the log, and how much of each stream was before it

A part is a sequence of records (``log_part``). Output goes from the FIFO into the file without
passing the agent's memory (splice(2)). While that goes on, the record's length says that it reaches
to the end of the file, which an agent that finds it after another's death makes true: no byte is
lost, none twice.

The newest bytes are kept, as many as the configuration says, and up to an eighth more. Nobody who
reads the log is waited for.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import trio

from agent.processes.pipes import LARGE_PIPE_BYTES
from agent.processes.process import Stream
from agent.workload.log_part import HEADER_BYTES, OPEN, Counts, Part, found_parts, records

RECORD_BYTES = 64 * 1024
"""Of output in a record, at most."""

_PARTS = 8
# Records of single bytes are nine times as long as what is in them: files may have this much more.
_MOST_OVERHEAD = 2


@attrs.define(eq=False)
class Reader:
    """One reader's place in the log. Made by ``WorkloadLog.reader``; ``close`` ends it."""

    _log: WorkloadLog
    _part: Part
    _offset: int
    _inside: int
    """How much of the record at ``_offset`` was read."""
    _read: Counts
    """How far it is in each stream."""
    _lost: set[Stream]
    _on_growth: Callable[[], None]
    is_closed: bool = False

    def read(self, until: Counts | None = None) -> tuple[Stream, bytes, bool] | None:
        """The next output, at most 64 KiB, and whether some before it was lost; None: no more yet.

        ``until`` is how far the log was when that was its ``written``: nothing after it is given.

        Raises:
            OSError: the files cannot be read.
        """
        self._catch_up()
        while True:
            part = self._part
            if self._offset >= part.end:
                following = self._log.part_after(part)
                if following is None:
                    return None
                self._part, self._offset, self._inside = following, 0, 0
                continue
            stream, lost, length = part.header(self._offset)
            if lost and not self._inside:
                self._lost.add(stream)
            if self._inside < length:
                most = min(length - self._inside, RECORD_BYTES)
                if until is not None:
                    # What was written later may have become a part of the same record.
                    most = min(most, until[stream] - self._read[stream])
                    if most <= 0:
                        return None
                start = self._offset + HEADER_BYTES + self._inside
                data = os.pread(part.file, most, start)
                self._inside += len(data)
                self._read[stream] += len(data)
                is_truncated = stream in self._lost
                self._lost.discard(stream)
                return stream, data, is_truncated
            if self._offset + HEADER_BYTES + length >= part.end and part is self._log.newest:
                return None  # it may still grow
            self._offset += HEADER_BYTES + length
            self._inside = 0

    def has_read_until(self, counts: Counts) -> bool:
        """Whether it is as far as the log was when that was its ``written``."""
        return not self.left_bytes(counts)

    def left_bytes(self, counts: Counts) -> int:
        """How much there is to read until it is as far."""
        self._catch_up()
        return sum(max(0, counts[stream] - self._read[stream]) for stream in Stream)

    def _catch_up(self) -> None:
        """Go on with what is kept, when that begins only after this place."""
        oldest = self._log.oldest
        if self._part.number >= oldest.number:
            return
        self._part, self._offset, self._inside = oldest, 0, 0
        for stream in Stream:
            if self._read[stream] < oldest.before[stream]:
                self._read[stream] = oldest.before[stream]
                self._lost.add(stream)

    def close(self) -> None:
        """Be told of no more; once or again."""
        if not self.is_closed:
            self.is_closed = True
            self._log.forget(self._on_growth)


@attrs.define(eq=False)
class WorkloadLog:
    """Made by ``open``. ``run`` takes what is written; ``close`` comes after that."""

    directory: Path
    size_bytes: int
    _parts: deque[Part]
    _fifos: dict[Stream, int]
    _lost: set[Stream] = attrs.field(factory=set)
    _on_growth: list[Callable[[], None]] = attrs.field(factory=list)

    @classmethod
    def open(cls, directory: Path, size_bytes: int) -> WorkloadLog:
        """The log in ``directory``, which is made if it is missing; an earlier agent's goes on.

        Blocks.

        Raises:
            OSError: the directory cannot be written to.
        """
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        fifos = {}
        for stream in Stream:
            path = directory / stream.value
            with suppress(FileExistsError):
                os.mkfifo(path, 0o600)
            # For writing too: no end is seen between two runs of a workload.
            fifos[stream] = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            with suppress(OSError):
                fcntl.fcntl(fifos[stream], fcntl.F_SETPIPE_SZ, LARGE_PIPE_BYTES)
        log = cls(directory, size_bytes, deque(found_parts(directory)), fifos)
        if not log._parts:
            log._begin_part()
        return log

    @property
    def oldest(self) -> Part:
        return self._parts[0]

    @property
    def newest(self) -> Part:
        return self._parts[-1]

    @property
    def written(self) -> Counts:
        """How much of each stream has been written, ever."""
        part = self.newest
        return {stream: part.before[stream] + part.held[stream] for stream in Stream}

    def fifo(self, stream: Stream) -> Path:
        """What the workload writes to."""
        return self.directory / stream.value

    async def run(self) -> None:
        """Take what is written until cancelled."""
        async with trio.open_nursery() as nursery:
            for stream in Stream:
                nursery.start_soon(self._follow, stream)

    async def _follow(self, stream: Stream) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._fifos[stream])
            self._take(stream)

    def drain(self) -> None:
        """Take what lies in the FIFOs now: all that those who have ended have written."""
        for stream in Stream:
            # No more than fits in can have lain in it.
            left = LARGE_PIPE_BYTES
            while left > 0 and (taken := self._take(stream)):
                left -= taken

    def _take(self, stream: Stream) -> int:
        """Append what a FIFO holds, at most 64 KiB; how much that was."""
        fifo = self._fifos[stream]
        try:
            taken = self._append(stream, fifo)
        except OSError:
            # A full disk loses output, and stops no workload.
            try:
                taken = len(os.read(fifo, RECORD_BYTES))
            except BlockingIOError:
                return 0
            self._lost.add(stream)
            return taken
        if taken:
            for tell in list(self._on_growth):
                tell()
        return taken

    def _append(self, stream: Stream, fifo: int) -> int:
        part = self.newest
        if part.end >= self.size_bytes // _PARTS:
            part = self._begin_part()
        lost = stream in self._lost
        length = 0
        offset = part.end
        if part.end and not lost:
            last, was_lost, last_length = part.header(part.last)
            if last is stream and last_length < RECORD_BYTES:
                offset, length, lost = part.last, last_length, was_lost
        start = offset + HEADER_BYTES + length
        moved = 0
        part.write_header(offset, stream, OPEN, lost=lost)
        try:
            os.lseek(part.file, start, os.SEEK_SET)
            with suppress(BlockingIOError):
                moved = os.splice(
                    fifo, part.file, RECORD_BYTES - length, flags=os.SPLICE_F_NONBLOCK
                )
        finally:
            if length + moved:
                part.write_header(offset, stream, length + moved, lost=lost)
            else:
                os.ftruncate(part.file, offset)
        if moved:
            self._lost.discard(stream)
            part.last, part.end = offset, start + moved
            part.held[stream] += moved
        return moved

    def _begin_part(self) -> Part:
        before = dict.fromkeys(Stream, 0)
        number = 0
        if self._parts:
            before, number = self.written, self.newest.number + 1
        counts = ".".join(str(before[stream]) for stream in Stream)
        path = self.directory / f"{number}.{counts}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._parts.append(Part(number, path, file, before))
        while len(self._parts) > 1 and self._is_dispensable(self.oldest):
            part = self._parts.popleft()
            part.path.unlink(missing_ok=True)
            os.close(part.file)
        return self.newest

    def _is_dispensable(self, part: Part) -> bool:
        rest = [each for each in self._parts if each is not part]
        return (
            sum(each.held_bytes for each in rest) >= self.size_bytes
            or sum(each.end for each in rest) >= _MOST_OVERHEAD * self.size_bytes
        )

    def part_after(self, part: Part) -> Part | None:
        """For readers: the next one, if there is one yet."""
        return next((each for each in self._parts if each.number > part.number), None)

    def reader(self, on_growth: Callable[[], None], *, live: bool = False) -> Reader:
        """One that begins with what is kept, or, ``live``, with what is written from now on.

        ``on_growth`` is called whenever there is more. Raises OSError.
        """
        self._on_growth.append(on_growth)
        if live:
            part = self.newest
            inside = part.header(part.last)[2] if part.end else 0
            return Reader(self, part, part.last, inside, self.written, set(), on_growth)
        part, offset, inside, read = self.oldest, 0, 0, dict(self.oldest.before)
        excess = sum(each.held_bytes for each in self._parts) - self.size_bytes
        if excess > 0:
            for at, stream, length in records(os.pread(part.file, part.end, 0)):
                offset, inside = at, min(length, excess)
                excess -= inside
                read[stream] += inside
                if not excess:
                    break
        lost = {stream for stream in Stream if read[stream]}
        return Reader(self, part, offset, inside, read, lost, on_growth)

    def forget(self, on_growth: Callable[[], None]) -> None:
        """For readers: one has ended."""
        self._on_growth.remove(on_growth)

    def close(self) -> None:
        """Let go of its files."""
        for file in (*self._fifos.values(), *(part.file for part in self._parts)):
            os.close(file)


@contextmanager
def opened_log(directory: Path, size_bytes: int) -> Iterator[WorkloadLog]:
    """``WorkloadLog.open`` for the block; raises OSError."""
    log = WorkloadLog.open(directory, size_bytes)
    try:
        yield log
    finally:
        log.close()
