"""Reading a file block by block."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from agent.files.failure import failing_on
from agent.files.guest_path import GuestPath, GuestRoot, closing

BLOCK_BYTES = 1024 * 1024


class Download:
    """A regular file, or a part of it, from its first byte to its last. Made by ``opened``."""

    def __init__(self, path: GuestPath, file: int, length: int | None, *, digest: bool) -> None:
        self._path = path
        self._file = file
        self._left = length
        self._sha256 = hashlib.sha256() if digest else None
        self.size = 0
        """Bytes that were read so far."""

    @classmethod
    @contextmanager
    def opened(
        cls,
        root: GuestRoot,
        path: GuestPath,
        *,
        offset: int = 0,
        length: int | None = None,
        digest: bool = False,
    ) -> Iterator[Download]:
        """The file at ``path``, for the block: ``length`` bytes from ``offset``, or to its end.

        ``digest``: of what is read. Blocks.

        Raises:
            AgentError: FILE_IO_FAILED, also for what is no regular file, which is not opened.
        """
        with failing_on("read", path):
            file = root.open_regular(path)
        with closing(file):
            with failing_on("read", path):
                # Beyond what lseek(2) takes no file has bytes.
                if offset >= _FARTHEST:
                    length = 0
                elif offset:
                    os.lseek(file, offset, os.SEEK_SET)
            yield cls(path, file, length, digest=digest)

    def read(self) -> bytes:
        """The next block: 1 MiB, less at the end, and nothing after it. Blocks.

        A file that shrinks ends early, one that grows ends where it does when that is read.

        Raises:
            AgentError: FILE_IO_FAILED.
        """
        wanted = BLOCK_BYTES if self._left is None else min(BLOCK_BYTES, self._left)
        with failing_on("read", self._path):
            block = os.read(self._file, wanted) if wanted else b""
            # Files of /proc give a page at a time.
            while 0 < len(block) < wanted and (more := os.read(self._file, wanted - len(block))):
                block += more
        self.size += len(block)
        if self._left is not None:
            self._left -= len(block)
        if self._sha256 is not None:
            self._sha256.update(block)
        return block

    @property
    def sha256(self) -> str | None:
        """Of what was read so far, in hexadecimal, where it was asked for."""
        return None if self._sha256 is None else self._sha256.hexdigest()


_FARTHEST = 2**63 - 1
