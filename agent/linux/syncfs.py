"""syncfs(2): write one file system back to its disk."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def syncfs(descriptor: int) -> None:
    """Return when all that was written to the file system of an open file is on its disk.

    Raises:
        OSError: what the disk said; since Linux 5.8 also what it said of earlier writes.
    """
    if _libc.syncfs(ctypes.c_int(descriptor)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
