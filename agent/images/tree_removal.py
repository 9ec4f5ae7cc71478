"""Removing a tree that a container made, which may be of any shape."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

# Deeper directories are moved up first: a container can nest them beyond any path, stack or
# descriptor limit.
_DEEPEST = 32


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it; fine if it is not there. Blocks.

    Never follows a symbolic link, and never leaves the file system: it stops at a mount (EBUSY).

    Raises:
        OSError: what the kernel says, with the name; what was removed by then stays removed.
    """
    try:
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _Removal(top).run()
    finally:
        os.close(top)
    path.rmdir()


class _Removal:
    def __init__(self, top: int) -> None:
        self._top = top
        self._device = os.fstat(top).st_dev
        self._moved = 0

    def run(self) -> None:
        moved = -1
        while moved < self._moved:
            moved = self._moved
            self._empty(self._top, 0)

    def _empty(self, directory: int, depth: int) -> None:
        with os.scandir(directory) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in found:
            if not is_directory:
                os.unlink(name, dir_fd=directory)
            elif depth < _DEEPEST:
                self._remove(name, directory, depth + 1)
            else:
                self._moved += 1
                # No name of a container's is in the top directory, which holds upper and work.
                os.rename(name, f"moved-{self._moved}", src_dir_fd=directory, dst_dir_fd=self._top)

    def _remove(self, name: str, parent: int, depth: int) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory = os.open(name, flags, dir_fd=parent)
        try:
            if os.fstat(directory).st_dev != self._device:
                raise OSError(errno.EBUSY, "something is mounted there", name)
            self._empty(directory, depth)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=parent)
