"""unshare(2) and setns(2), which Python has from 3.12 on only."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000

# linux/proc_ns.h: PROC_PID_INIT_INO
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Take new namespaces for the calling thread; threads that it starts later share them.

    With CLONE_FS, its own root and working directory.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(descriptor: int, nstype: int) -> None:
    """Move the calling thread into the namespace that ``descriptor`` is open on.

    Into a mount namespace only a thread that shares no root with others (CLONE_FS); its root is
    that of the namespace afterwards.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, EINVAL for another kind of namespace.
    """
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(nstype)), "setns")


def in_initial_pid_namespace() -> bool:
    """Whether our processes are numbered as the kernel itself does: that of no container."""
    return Path("/proc/self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
