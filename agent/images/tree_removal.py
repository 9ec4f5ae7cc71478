"""Removing a tree that a container made, which may be of any shape."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from agent.linux.openat2 import RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

# Deeper directories are moved up first: a container can nest them beyond any path, stack or
# descriptor limit.
_DEEPEST = 32

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it; fine if it is not there. Blocks.

    Never follows a symbolic link, and never enters what is mounted there: that is EXDEV.

    Raises:
        OSError: what the kernel says, with the name; what was removed by then stays removed.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    _empty_and_close(top)
    path.rmdir()


def remove_tree_in(directory: int, name: str) -> None:
    """The same for the directory ``name`` in an open one, which must be there and no mount."""
    _empty_and_close(
        openat2(directory, name, _DIRECTORY, resolve=RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS)
    )
    os.rmdir(name, dir_fd=directory)


def _empty_and_close(top: int) -> None:
    try:
        while _empty(top, top, 0):
            pass
    finally:
        os.close(top)


def _empty(directory: int, top: int, depth: int) -> bool:
    """Remove what is in a directory; whether something was moved to the ``top`` for that."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    moved = False
    for name, is_directory in found:
        if not is_directory:
            os.unlink(name, dir_fd=directory)
        elif depth == _DEEPEST:
            os.rename(name, secrets.token_hex(16), src_dir_fd=directory, dst_dir_fd=top)
            moved = True
        else:
            below = openat2(
                directory, name, _DIRECTORY, resolve=RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
            )
            try:
                moved |= _empty(below, top, depth + 1)
            finally:
                os.close(below)
            os.rmdir(name, dir_fd=directory)
    return moved
