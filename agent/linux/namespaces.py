"""unshare(2), which Python has from 3.12 on only."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Take new namespaces for the calling thread; threads that it starts later share them.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    if _libc.unshare(ctypes.c_int(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")
