"""Loading a kernel module: finit_module(2)."""

from __future__ import annotations

import ctypes
import os

_SYS_FINIT_MODULE = 313 if os.uname().machine == "x86_64" else 273  # else the generic table

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def finit_module(descriptor: int, parameters: str = "") -> None:
    """Load the module in an open file, whatever it needs being there.

    Raises:
        OSError: EEXIST: it is loaded. ENOEXEC: it is another kernel's. ENODEV, EOPNOTSUPP: what
            it drives is not there. ENOSYS: a kernel without modules.
    """
    result = _libc.syscall(
        ctypes.c_long(_SYS_FINIT_MODULE), descriptor, parameters.encode(), ctypes.c_int(0)
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
