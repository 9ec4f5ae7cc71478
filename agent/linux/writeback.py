"""Writing a file's dirty pages to the disk before anybody waits for it: sync_file_range(2)."""

from __future__ import annotations

import ctypes
import os

SYNC_FILE_RANGE_WRITE = 0x2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def sync_file_range(
    fd: int, offset: int = 0, byte_count: int = 0, flags: int = SYNC_FILE_RANGE_WRITE
) -> None:
    """Begin to write what is dirty in a range of a file; `byte_count` 0 is up to its end.

    With these flags it is no sync: nothing is waited for but room in the disk's queue, and neither
    the file's length nor where its blocks are is written. Raises OSError.
    """
    if _libc.sync_file_range(fd, offset, byte_count, flags) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
