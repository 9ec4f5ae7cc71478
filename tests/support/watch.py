"""Waiting for a change of a file or directory, without looking again and again (inotify(7))."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import trio

_IN_MODIFY, _IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x2, 0x40, 0x80, 0x100, 0x200
_ANY_CHANGE = _IN_MODIFY | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE


async def until(condition: Callable[[], bool], watched: Path, within_s: float = 10) -> None:
    """Return once `condition` holds; it is asked again whenever `watched` changes.

    A directory changes when an entry comes or goes, a file when it is written to. Raises
    trio.TooSlowError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(watched), _ANY_CHANGE) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(watched))
        with trio.fail_after(within_s):
            while not condition():
                await trio.lowlevel.wait_readable(fd)
                os.read(fd, 64 * 1024)
    finally:
        os.close(fd)
