"""Reading a container's files from outside, without being led out of them by symlinks."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from agent.linux.openat2 import RESOLVE_IN_ROOT, openat2

# passwd and group files have kilobytes; an image's author may claim otherwise.
_TEXT_BYTES = 4 * 1024 * 1024


@attrs.frozen
class Rootfs:
    """An image's file tree. Paths, with or without a leading slash, and symlinks stay inside."""

    _descriptor: int

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Rootfs]:
        """The tree at ``path``, for the block. Raises OSError."""
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield cls(descriptor)
        finally:
            os.close(descriptor)

    def open(self, path: str) -> int:
        """A descriptor to read from, which the caller closes.

        It never waits for a fifo's other end, and a device is not acted on. Raises OSError.
        """
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        return openat2(self._descriptor, path, flags, resolve=RESOLVE_IN_ROOT)

    def read_text(self, path: str) -> str:
        """The text of a regular file, "" if there is none; at most 4 MiB. Raises OSError."""
        try:
            descriptor = self.open(path)
        except (FileNotFoundError, NotADirectoryError):
            return ""
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return ""
            return file.read(_TEXT_BYTES).decode(errors="replace")
