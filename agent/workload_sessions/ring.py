"""Output that waits for its peer, in memory of a fixed size."""

from __future__ import annotations

import mmap
import struct

import attrs

# A piece's number and its length, before its bytes.
_HEADER = struct.Struct(">QI")
HEADER_BYTES = _HEADER.size
# What an emptied ring keeps: a peer that keeps up has no more than that waiting.
_KEPT_BYTES = 256 * 1024


@attrs.define(eq=False)
class Ring:
    """Numbered pieces of bytes, the oldest of which give way where there is no more room.

    Mapped, not allocated: pages are there from when they are first written to, and go back to the
    kernel as soon as the ring is empty or closed. What malloc and Python keep of freed chunks was a
    third more.
    """

    size_bytes: int
    """Of all pieces, each with its header."""
    _memory: mmap.mmap | None = None
    _first: int = 0
    """Where the oldest piece begins."""
    _last: int = 0
    """Where the newest one does."""
    _held_bytes: int = 0
    _used_bytes: int = 0
    """Of the memory, since it was last given back."""

    @property
    def held_bytes(self) -> int:
        """How much is in it, headers included."""
        return self._held_bytes

    @property
    def first_number(self) -> int:
        """Of the oldest piece; there is one."""
        return self._header(self._first)[0]

    def put(self, number: int, data: bytes) -> bool:
        """Add a piece; whether some of the oldest bytes had to go. It fits the ring alone."""
        lost = self._make_room(HEADER_BYTES + len(data))
        self._last = self._end
        self._held_bytes += HEADER_BYTES
        self._write(self._last, _HEADER.pack(number, len(data)))
        self._append(data)
        return lost

    def extend(self, data: bytes) -> bool:
        """Add to the newest piece; as ``put``."""
        lost = self._make_room(len(data))
        number, length = self._header(self._last)
        self._write(self._last, _HEADER.pack(number, length + len(data)))
        self._append(data)
        return lost

    def newest(self) -> tuple[int, int]:
        """The number of the newest piece and its length; there is one."""
        return self._header(self._last)

    def take(self) -> bytes:
        """The oldest piece, which is gone then; there is one."""
        _, length = self._header(self._first)
        data = self._read(self._first + HEADER_BYTES, length)
        self._forget(HEADER_BYTES + length)
        if not self._held_bytes:
            self._first = 0
            if self._used_bytes > _KEPT_BYTES:
                assert self._memory is not None
                self._memory.madvise(mmap.MADV_DONTNEED)
                self._used_bytes = 0
        return data

    def close(self) -> None:
        """Give its memory back, with what is in it; once or again."""
        self._held_bytes = self._used_bytes = 0
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    @property
    def _end(self) -> int:
        return (self._first + self._held_bytes) % self.size_bytes

    def _make_room(self, more_bytes: int) -> bool:
        lost = False
        while (excess := self._held_bytes + more_bytes - self.size_bytes) > 0:
            lost = True
            number, length = self._header(self._first)
            if length <= excess:
                self._forget(HEADER_BYTES + length)
                continue
            self._forget(excess)
            self._write(self._first, _HEADER.pack(number, length - excess))
        return lost

    def _forget(self, oldest_bytes: int) -> None:
        self._first = (self._first + oldest_bytes) % self.size_bytes
        self._held_bytes -= oldest_bytes

    def _append(self, data: bytes) -> None:
        self._write(self._end, data)
        self._held_bytes += len(data)

    def _header(self, offset: int) -> tuple[int, int]:
        number, length = _HEADER.unpack(self._read(offset, HEADER_BYTES))
        return number, length

    def _read(self, offset: int, length: int) -> bytes:
        assert self._memory is not None
        offset %= self.size_bytes
        data = self._memory[offset : offset + length]
        return data if len(data) == length else data + self._memory[: length - len(data)]

    def _write(self, offset: int, data: bytes) -> None:
        if self._memory is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory = mmap.mmap(-1, self.size_bytes, flags)
        before_end = data[: self.size_bytes - offset]
        self._memory[offset : offset + len(before_end)] = before_end
        self._memory[: len(data) - len(before_end)] = data[len(before_end) :]
        self._used_bytes = max(self._used_bytes, min(offset + len(data), self.size_bytes))
