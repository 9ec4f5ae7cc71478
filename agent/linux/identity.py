"""Who the calling thread is: its user and groups, and the only capabilities that it, and what it
executes, may have. Of this thread alone: glibc's own functions change all of a process's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from agent.linux.capset import Capabilities, capset

# linux/capability.h
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_SETFCAP = 31

# linux/prctl.h, linux/securebits.h
_PR_SET_SECUREBITS = 28
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
_SECBIT_NOROOT, _SECBIT_NO_SETUID_FIXUP = 0x1, 0x4

_IS_X86_64 = os.uname().machine == "x86_64"  # else the generic table, so arm64
_SYS_SETRESUID = 117 if _IS_X86_64 else 147
_SYS_SETRESGID = 119 if _IS_X86_64 else 149
_SYS_SETGROUPS = 116 if _IS_X86_64 else 159

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def assume(uid: int, gid: int, capabilities: Iterable[int]) -> None:
    """Become this user, in this group alone, with these capabilities and no others.

    They stay over execve(2), which gives no more of them to root than to anybody else
    (capabilities(7): SECBIT_NOROOT, ambient capabilities). There is no way back: for a thread that
    ends.

    Raises:
        OSError: EPERM for who is not root.
    """
    held = tuple(capabilities)
    _check(
        _libc.prctl(_PR_SET_SECUREBITS, _long(_SECBIT_NOROOT | _SECBIT_NO_SETUID_FIXUP), 0, 0, 0)
    )
    _syscall(_SYS_SETGROUPS, ctypes.c_size_t(0), None)
    _syscall(_SYS_SETRESGID, *[ctypes.c_uint(gid)] * 3)
    _syscall(_SYS_SETRESUID, *[ctypes.c_uint(uid)] * 3)
    mask = sum(1 << capability for capability in held)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    capset(Capabilities(low, low, low, high, high, high))
    for capability in held:
        _check(_libc.prctl(_PR_CAP_AMBIENT, _long(_PR_CAP_AMBIENT_RAISE), _long(capability), 0, 0))


def _long(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)


def _syscall(number: int, *arguments: object) -> None:
    _check(_libc.syscall(ctypes.c_long(number), *arguments))


def _check(result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
