"""Clocks: the kernel's own, set and watched, and those of PTP devices.

Every function raises OSError. Times are nanoseconds since 1970, in UTC.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time

# linux/ptp_clock.h: _IOWR('=', 8, struct ptp_sys_offset_precise)
PTP_SYS_OFFSET_PRECISE = 0xC0403D08
# Three times of seconds, nanoseconds and padding (the device's, CLOCK_REALTIME's and that of
# CLOCK_MONOTONIC_RAW), and 16 bytes to spare.
_OFFSET_PRECISE = struct.Struct("=qIIqIIqII16x")

# sys/timerfd.h
TFD_TIMER_ABSTIME = 0x1
TFD_TIMER_CANCEL_ON_SET = 0x2
TFD_NONBLOCK = os.O_NONBLOCK
TFD_CLOEXEC = os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


def clock_settime(time_ns: int) -> None:
    """clock_settime(2) with CLOCK_REALTIME: the whole kernel's, all its containers included.

    Only for whom the kernel belongs to.
    """
    time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


def ptp_sys_offset_precise(descriptor: int) -> tuple[int, int]:
    """PTP_SYS_OFFSET_PRECISE on a PTP device: its time, and CLOCK_REALTIME's at that very moment.

    Raises:
        OSError: EOPNOTSUPP: the device cannot tell them at once.
    """
    answer = fcntl.ioctl(descriptor, PTP_SYS_OFFSET_PRECISE, bytes(_OFFSET_PRECISE.size))
    device_s, device_ns, _, real_s, real_ns, *_ = _OFFSET_PRECISE.unpack(answer)
    return device_s * 10**9 + device_ns, real_s * 10**9 + real_ns


def clock_gettime(descriptor: int) -> int:
    """clock_gettime(2) on the clock of an open device: its number is FD_TO_CLOCKID of ptp(4)."""
    return time.clock_gettime_ns((~descriptor << 3) | 3)


def timerfd_create(clock: int, flags: int = TFD_CLOEXEC | TFD_NONBLOCK) -> int:
    """timerfd_create(2), which Python has from 3.13 on only; the caller closes the descriptor."""
    return _checked(_libc.timerfd_create(ctypes.c_int(clock), ctypes.c_int(flags)))


def timerfd_settime(descriptor: int, flags: int, at_s: int) -> None:
    """timerfd_settime(2): expire once, at ``at_s``.

    Raises:
        OSError: ECANCELED with TFD_TIMER_CANCEL_ON_SET: the clock was set before; it is in force.
    """
    value = _Itimerspec(_Timespec(0, 0), _Timespec(at_s, 0))
    _checked(
        _libc.timerfd_settime(descriptor, ctypes.c_int(flags), ctypes.byref(value), None),
    )


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
