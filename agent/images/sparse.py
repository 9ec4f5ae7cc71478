"""Sparse files in a tar: where their data lies, and how they are made whole again.

GNU tar has four ways to say it, all described in
https://www.gnu.org/software/tar/manual/html_section/Sparse-Formats.html: type `S` with the map in
the header and in blocks behind it (old GNU), and three with PAX records: the map as many records
(0.0), as one record (0.1), or in front of the content (1.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from agent.images.layer_tar import Hole
from agent.images.tar_header import BLOCK, TarError

# A hole costs nothing in the archive and in the layer, but its full length wherever the file is
# copied to, as into an overlay that writes to it. Enough for a database's or a disk image's
# preallocated file, too little for a layer of a few KiB to fill a disk: lastlog(5) of a system with
# large uids has terabytes.
MAX_HOLE_BYTES = 8 << 30

MAX_EXTENTS = 100_000
_MAX_MAP_BYTES = 4 << 20

Record = tuple[bytes, bytes]
Extent = tuple[int, int]


@attrs.frozen
class SparseMap:
    """A file of ``size`` bytes, all zero but for its ``extents``: (offset, length), ascending."""

    size: int
    extents: tuple[Extent, ...]

    @property
    def stored_bytes(self) -> int:
        """How much content follows the header: what the extents hold."""
        return sum(length for _, length in self.extents)

    @property
    def hole_bytes(self) -> int:
        return self.size - self.stored_bytes

    def validate(self) -> None:
        """Raise TarError unless the extents ascend, do not overlap and lie within the file."""
        end = 0
        for offset, length in self.extents:
            if offset < end or length < 0:
                raise TarError("its sparse map is not in order")
            end = offset + length
        if end > self.size:
            raise TarError("its sparse map goes beyond its end")


class Expansion:
    """A sparse entry's content, on its way from the stored extents to the whole file."""

    def __init__(self, sparse: SparseMap) -> None:
        self._size = sparse.size
        self._extents = iter((*sparse.extents, (sparse.size, 0)))
        self._offset, self._left = next(self._extents)
        self._position = 0
        self.stored_padding = -sparse.stored_bytes % BLOCK
        """How much follows the stored bytes to fill their last block."""

    def feed(self, stored: memoryview) -> Iterator[memoryview | Hole]:
        """Stored bytes in, the file's next bytes out; not more than `stored_bytes` go in."""
        while stored:
            yield from self._fill_to(self._offset)
            piece = stored[: self._left]
            stored = stored[len(piece) :]
            self._left -= len(piece)
            self._position += len(piece)
            if piece:
                yield piece
            if self._left == 0:
                self._offset, self._left = next(self._extents)

    def finish(self) -> Iterator[Hole]:
        """The hole at the end, and what pads the content to whole blocks."""
        yield from self._fill_to(self._size + -self._size % BLOCK)

    def _fill_to(self, offset: int) -> Iterator[Hole]:
        if self._position < offset:
            yield Hole(offset - self._position)
            self._position = offset


def gnu_map(block: bytes) -> tuple[list[Extent], int, bool]:
    """An `S` header: its first extents, the file's size, whether extension blocks follow."""
    return _gnu_extents(block[386:482]), _gnu_number(block[483:495]), block[482] != 0


def gnu_extension(block: bytes) -> tuple[list[Extent], bool]:
    """An extension block: further extents, and whether another one follows."""
    return _gnu_extents(block[:504]), block[504] != 0


@attrs.frozen
class PaxSparse:
    """What PAX records say of a sparse file; ``map`` is None where it comes before the content."""

    name: bytes | None
    size: int
    map: SparseMap | None


def pax_sparse(records: Sequence[Record]) -> PaxSparse | None:
    """The sparse file that an entry's PAX records (in their order) describe, if any.

    Raises:
        TarError: they contradict themselves.
    """
    said = dict(records)
    name = said.get(b"GNU.sparse.name")
    if said.get(b"GNU.sparse.major") == b"1" and said.get(b"GNU.sparse.minor") == b"0":
        return PaxSparse(name, _decimal(said.get(b"GNU.sparse.realsize", b"")), None)
    if b"GNU.sparse.major" in said:
        raise TarError("its sparse format is none that GNU tar ever had")
    if b"GNU.sparse.size" not in said:
        return None
    if b"GNU.sparse.map" in said:
        text = said[b"GNU.sparse.map"]
        numbers = [_decimal(number) for number in text.split(b",")] if text else []
    else:
        keys = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
        pairs = [record for record in records if record[0] in keys]
        if [keyword for keyword, _ in pairs] != [*keys] * (len(pairs) // 2):
            raise TarError("its sparse map is not in order")
        numbers = [_decimal(number) for _, number in pairs]
    size = _decimal(said[b"GNU.sparse.size"])
    return PaxSparse(name, size, SparseMap(size, _paired(numbers)))


class LeadingMap:
    """The map in front of the content (1.0): decimal numbers, a line each, in whole blocks.

    The first says how many extents there are; then come the offset and the length of each.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._data = bytearray()
        self._newlines = 0

    def feed(self, block: bytes) -> SparseMap | None:
        """The next block in; the map, once it was the last one. What follows is content."""
        self._data += block
        self._newlines += block.count(b"\n")
        if len(self._data) > _MAX_MAP_BYTES or not self._newlines:
            raise TarError("its sparse map is too long")
        count = _decimal(bytes(self._data[: self._data.index(b"\n")]))
        if count > MAX_EXTENTS:
            raise TarError("its sparse map is too long")
        if self._newlines < 2 * count + 1:
            return None
        lines = bytes(self._data).split(b"\n", 2 * count + 1)
        return SparseMap(self._size, _paired([_decimal(line) for line in lines[1:-1]]))


def _gnu_extents(fields: bytes) -> list[Extent]:
    extents = []
    for start in range(0, len(fields), 24):
        if fields[start] == 0:
            break
        extents.append(
            (_gnu_number(fields[start : start + 12]), _gnu_number(fields[start + 12 : start + 24]))
        )
    return extents


def _gnu_number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError(f"a number in its sparse map is {digits!r}")
    return int(digits, 8)


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 19:
        raise TarError(f"a number in its sparse map is {value[:40]!r}")
    return int(value)


def _paired(numbers: Sequence[int]) -> tuple[Extent, ...]:
    if len(numbers) % 2:
        raise TarError("its sparse map has half an extent")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))
