"""The mark on a disk whose file system is being made: that disk may be formatted once more.

mke2fs writes its superblock last, after much else. A disk that lost its power before that holds
data that no tool knows, and without the mark nobody could tell them from somebody's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

MARK = b"innkeep is making a file system on this disk\n".ljust(512, b"\0")

# Before the last 64 KiB, which mke2fs wipes. What it writes itself is mostly at the other end; a
# mark that it does write over is gone, and the disk is then left alone, as any other would be.
_BEFORE_END_BYTES = 1 << 20
_ALIGNED_TO = 4096


@contextmanager
def marked(device: str) -> Iterator[None]:
    """Have the mark on ``device``, whose contents are nobody's, until the block has succeeded.

    What the block has written is on the disk before the mark goes. A disk with no room for it gets
    none. Raises OSError.
    """
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        position = _position(descriptor)
        if position > 0:
            os.pwrite(descriptor, MARK, position)
            os.fsync(descriptor)
        yield
        os.fsync(descriptor)
        if position > 0 and os.pread(descriptor, len(MARK), position) == MARK:
            os.pwrite(descriptor, bytes(len(MARK)), position)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_marked(device: str) -> bool:
    """Whether somebody began to make a file system there and did not come to the end of it.

    Raises OSError.
    """
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        position = _position(descriptor)
        return position > 0 and os.pread(descriptor, len(MARK), position) == MARK
    finally:
        os.close(descriptor)


def _position(descriptor: int) -> int:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    return (size - _BEFORE_END_BYTES) // _ALIGNED_TO * _ALIGNED_TO
