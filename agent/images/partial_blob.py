"""A blob on its way into the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from agent.images.atomic_file import WRITEBACK_BYTES, Naming
from agent.linux.writeback import sync_file_range

_BLOCK = 1 << 20


class PartialBlob:
    """The beginning of a blob, in a file that survives errors, hang-ups and crashes.

    What it holds is not to be believed before its digest is verified: after a power loss a file
    can have its length without its contents. A context manager that closes the file, and keeps
    it unless `discard` was called, or what `whole` says was done. Blocking; raises OSError.
    """

    def __init__(self, path: Path, blob_path: Path) -> None:
        self._path = path
        self._blob_path = blob_path
        self._file = path.open("a+b")
        self._unwritten_bytes = 0

    def __enter__(self) -> PartialBlob:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.flush()
            is_empty = not self.size
        finally:
            self._file.close()
        if is_empty:
            self._path.unlink(missing_ok=True)  # of what was refused nothing stays

    @property
    def size(self) -> int:
        """How many bytes are there."""
        return os.fstat(self._file.fileno()).st_size

    def blocks(self) -> Iterator[bytes]:
        """What is there, from the start."""
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            yield block

    def append(self, block: bytes) -> None:
        """Add what comes next."""
        self._file.write(block)
        self._unwritten_bytes += len(block)
        if self._unwritten_bytes >= WRITEBACK_BYTES:
            self._unwritten_bytes = 0
            sync_file_range(self._file.fileno())

    def whole(self) -> Naming:
        """What makes it a blob of the store: the caller has verified its size and digest."""
        self._file.flush()
        return Naming(self._path, self._blob_path)

    def discard(self) -> None:
        """Remove it: it is not the beginning of the blob."""
        self._path.unlink(missing_ok=True)
