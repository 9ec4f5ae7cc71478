"""openat2(2): open a path that may not leave a directory, whatever symlinks say."""

from __future__ import annotations

import ctypes
import os

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_SYS_OPENAT2 = 437  # the same on every architecture

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """A new descriptor, close-on-exec, for ``path`` below ``dirfd``; the caller closes it.

    Raises:
        OSError: naming ``path``; EAGAIN where ``..`` met a rename and the caller may try again.
        ValueError: a NUL byte in ``path``.
    """
    encoded = path.encode("utf-8", "surrogateescape")
    if b"\0" in encoded:
        raise ValueError("a path cannot hold a NUL byte")
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    descriptor: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(dirfd),
        ctypes.c_char_p(encoded),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return descriptor
