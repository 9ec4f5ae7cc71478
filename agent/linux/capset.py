"""capget(2) and capset(2), of the calling thread."""

from __future__ import annotations

import ctypes
import os

CAP_SYS_RESOURCE = 24

_VERSION_3 = 0x20080522  # linux/capability.h: 64 capabilities, as two halves of 32

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class Capabilities(ctypes.Structure):
    """The sets of a thread, each capability a bit: those below 32, then the others."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
        ("effective_high", ctypes.c_uint32),
        ("permitted_high", ctypes.c_uint32),
        ("inheritable_high", ctypes.c_uint32),
    )


def capget() -> Capabilities:
    """What the calling thread has."""
    found = Capabilities()
    _check(_libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(found)), "capget")
    return found


def capset(capabilities: Capabilities) -> None:
    """Change what the calling thread has, and no other of the process.

    Raises:
        OSError: EPERM for what is not permitted to it.
    """
    header = _Header(_VERSION_3, 0)
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(capabilities)), "capset")


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)
