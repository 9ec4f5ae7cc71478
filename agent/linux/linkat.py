"""linkat(2) for a file that has no name yet, as O_TMPFILE makes one: Python's `os.link` needs a
path for what it links."""

from __future__ import annotations

import ctypes
import os

_AT_EMPTY_PATH = 0x1000

_libc = ctypes.CDLL(None, use_errno=True)


def linkat(descriptor: int, directory: int, name: str) -> None:
    """Give the open file ``descriptor`` the name ``name`` in the open ``directory``.

    Raises:
        OSError: naming ``name``; EEXIST where something has it already, a dangling link included.
    """
    result = _libc.linkat(
        ctypes.c_int(descriptor),
        b"",
        ctypes.c_int(directory),
        os.fsencode(name),
        ctypes.c_int(_AT_EMPTY_PATH),
    )
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
