"""The files that the workload's log is made of, and what an earlier agent has left of them.

A part is a sequence of records as docker's attach has them (Docker Engine API, "Stream format"): a
byte for the stream, three more, and a big-endian u32 length. The second byte is 1 where output
before the record was lost. While a record is being written its length is ``OPEN``: it reaches to
the end of the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from agent.processes.process import Stream

_HEADER = struct.Struct(">BB2xI")
HEADER_BYTES = _HEADER.size
_NUMBERS: Mapping[Stream, int] = {Stream.STDOUT: 1, Stream.STDERR: 2}
_STREAMS: Mapping[int, Stream] = {number: stream for stream, number in _NUMBERS.items()}
# As a length: to the end of the file.
OPEN = 0xFFFFFFFF

Counts = dict[Stream, int]
"""Bytes of each stream."""


@attrs.define(eq=False)
class Part:
    """One file of the log."""

    number: int
    path: Path
    file: int
    before: Counts
    """What the streams had written before it."""
    held: Counts = attrs.field(factory=lambda: dict.fromkeys(Stream, 0))
    end: int = 0
    """Where its last record ends."""
    last: int = 0
    """Where that begins."""

    @property
    def held_bytes(self) -> int:
        return sum(self.held.values())

    def header(self, offset: int) -> tuple[Stream, bool, int]:
        """Of a record: its stream, whether output before it was lost, and its length."""
        number, lost, length = _HEADER.unpack(os.pread(self.file, HEADER_BYTES, offset))
        return _STREAMS[number], bool(lost), length

    def write_header(self, offset: int, stream: Stream, length: int, *, lost: bool) -> None:
        header = _HEADER.pack(_NUMBERS[stream], lost, length)
        # Short where the disk is full: then there is no such record.
        if os.pwrite(self.file, header, offset) < len(header):
            raise OSError("the disk is full")


def records(content: bytes) -> Iterator[tuple[int, Stream, int]]:
    """Where each record of a part begins, its stream, and its length."""
    offset = 0
    while offset + HEADER_BYTES <= len(content):
        number, _, length = _HEADER.unpack_from(content, offset)
        yield offset, _STREAMS[number], length
        offset += HEADER_BYTES + length


def found_parts(directory: Path) -> Iterator[Part]:
    """The parts that an earlier agent left, the oldest first, with their last records mended."""
    found: list[tuple[list[int], Path]] = []
    for path in directory.iterdir():
        fields = path.name.split(".")
        if len(fields) == 1 + len(Stream) and all(field.isdecimal() for field in fields):
            found.append(([int(field) for field in fields], path))
    for (number, *before), path in sorted(found):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        part = Part(number, path, file, dict(zip(Stream, before, strict=True)))
        content = os.pread(file, os.fstat(file).st_size, 0)
        for offset, stream, length in records(content):
            start = offset + HEADER_BYTES
            if start + length > len(content):
                # Its agent died in the middle of it.
                length = len(content) - start
                if not length:
                    os.ftruncate(file, offset)
                    break
                lost = part.header(offset)[1]
                part.write_header(offset, stream, length, lost=lost)
            part.last, part.end = offset, start + length
            part.held[stream] += length
        yield part
