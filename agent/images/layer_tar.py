"""A layer's tar on the disk: what its EROFS image takes the contents of files from, and exports.

<hex of the diff_id>.tar
    the archive as mkfs.erofs read it, every byte of the layer's own tar among it
    where the pieces of the layer's own tar lie: (offset, length), each a native u64
    the CRC-32 of each MiB of the layer's own tar, each a native u32
    `_FOOTER`

"""

from __future__ import annotations

import io
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from agent.images.atomic_file import WRITEBACK_BYTES, begin_writeback

# What is checked and given away at once.
BLOCK_BYTES = 1 << 20

# Small pieces are gathered to so many bytes.
_BUFFER_BYTES = 256 << 10

# Magic, the lengths in bytes of the two tables, the CRC-32 of both together.
_FOOTER = struct.Struct("=8sQQI")
_MAGIC = b"innktar1"


class DamagedTar(Exception):
    """The disk has not kept what was written; the text says where."""


@attrs.frozen
class Hole:
    """So many zeros, which take no room on the disk."""

    length: int


Piece = bytes | memoryview | Hole


class LayerTarWriter:
    """Writes ``path``, which exists; whoever made it closes it and removes what is not finished.

    Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = io.BufferedWriter(io.FileIO(path, "wb"), _BUFFER_BYTES)
        # Not lists: of each entry that is written anew there are two parts.
        self._parts = array("Q")
        self._checksums = array("I")
        self._position = 0
        self._unwritten_bytes = 0
        self._checksum = 0
        self._block_bytes = 0

    def count(self, chunk: bytes | memoryview) -> None:
        """The next bytes of the layer's own tar, which come as `own` pieces, too."""
        view = memoryview(chunk)
        while view:
            taken = view[: BLOCK_BYTES - self._block_bytes]
            view = view[len(taken) :]
            self._checksum = _crc32(taken, self._checksum)
            self._block_bytes += len(taken)
            if self._block_bytes == BLOCK_BYTES:
                self._end_block()

    def write(self, piece: Piece, *, own: bool) -> None:
        """Append a piece; ``own`` ones are, one after the other, the layer's own tar."""
        if isinstance(piece, Hole):
            length = piece.length
            self._file.seek(length, os.SEEK_CUR)
        else:
            length = len(piece)
            self._file.write(piece)
            self._unwritten_bytes += length
        if own:
            self._add_part(length)
        self._position += length
        if self._unwritten_bytes >= WRITEBACK_BYTES:
            self._unwritten_bytes = 0
            begin_writeback(self._path)

    def finish(self) -> None:
        """All pieces are there: append where they are and what they come to."""
        if self._block_bytes:
            self._end_block()
        tables = [table.tobytes() for table in (self._parts, self._checksums)]
        checksum = _crc32(b"".join(tables))
        for piece in (*tables, _FOOTER.pack(_MAGIC, *map(len, tables), checksum)):
            self._file.write(piece)
        self._file.flush()

    def close(self) -> None:
        """Write no more; without `finish` what is still in memory is lost."""
        self._file.raw.close()

    def _add_part(self, length: int) -> None:
        if self._parts and self._parts[-2] + self._parts[-1] == self._position:
            self._parts[-1] += length
        else:
            self._parts.extend((self._position, length))

    def _end_block(self) -> None:
        self._checksums.append(self._checksum)
        self._checksum = self._block_bytes = 0


class LayerTar:
    """A finished layer's tar, open for reading: see `open_tar`."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._parts = array("Q")
        self._checksums = array("I")
        self._read_tables()
        self._window = memoryview(b"")
        self._window_start = 0

    def blocks(self) -> Iterator[bytes]:
        """The layer's own tar, bit for bit, in blocks of BLOCK_BYTES; the last one may be shorter.

        Raises:
            DamagedTar: the next block is not what was written; nothing of it comes.
            OSError: it cannot be read.
        """
        parts = zip(self._parts[::2], self._parts[1::2], strict=True)
        offset = left = 0
        for number, checksum in enumerate(self._checksums):
            gathered: list[memoryview] = []
            wanted = BLOCK_BYTES
            while wanted:
                if not left:
                    offset, left = next(parts, (0, 0))
                piece = self._read(offset, min(wanted, left))
                if not piece:
                    break
                gathered.append(piece)
                offset, left, wanted = offset + len(piece), left - len(piece), wanted - len(piece)
            block = b"".join(gathered)
            if _crc32(block) != checksum:
                raise DamagedTar(f"{self._name}: MiB {number} of the tar is not what was written")
            yield block

    def _read(self, offset: int, length: int) -> memoryview:
        """Up to so many bytes from there on; none at the end."""
        start = offset - self._window_start
        if not 0 <= start < len(self._window):
            # Most parts are small, and lie close together.
            self._window = memoryview(os.pread(self._fd, BLOCK_BYTES, offset))
            self._window_start, start = offset, 0
        return self._window[start : start + length]

    def _read_tables(self) -> None:
        end = os.fstat(self._fd).st_size - _FOOTER.size
        footer = os.pread(self._fd, _FOOTER.size, max(0, end))
        if len(footer) == _FOOTER.size:
            magic, middle, length, checksum = _FOOTER.unpack(footer)
            start = end - middle - length
            tables = os.pread(self._fd, middle + length, start) if start >= 0 else b""
            if magic == _MAGIC and _crc32(tables) == checksum:
                self._parts.frombytes(tables[:middle])
                self._checksums.frombytes(tables[middle:])
                return
        raise DamagedTar(f"{self._name}: its table is not what was written")


@contextmanager
def open_tar(path: Path) -> Iterator[LayerTar]:
    """A finished layer's tar, for one thread.

    Raises:
        DamagedTar: it was never finished, or the disk has damaged it.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield LayerTar(fd, path.name)
    finally:
        os.close(fd)


def _crc32(data: bytes | memoryview, before: int = 0) -> int:
    # Not above: the agent answers its first ping before anything of this size is imported.
    from isal import isal_zlib

    return isal_zlib.crc32(data, before)
