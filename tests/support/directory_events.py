"""Counting what happens in directories while it happens (inotify(7))."""

import ctypes
import os
import select
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_IN_MOVED_TO, _IN_CREATE, _IN_DELETE, _IN_CLOSE_WRITE = 0x80, 0x100, 0x200, 0x8
_EVENT = struct.Struct("iIII")


@contextmanager
def on_each_event(directories: Iterable[Path], on_event: Callable[[int], object]) -> Iterator[None]:
    """Call `on_event` with 1, 2, … whenever an entry is made, written, moved in or removed.

    At once and from a thread of its own, so that it can come in between.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    for directory in directories:
        mask = _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_CLOSE_WRITE
        if libc.inotify_add_watch(fd, os.fsencode(directory), mask) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(directory))
    ended, end = os.pipe()

    def watch() -> None:
        count = 0
        while True:
            ready, _, _ = select.select([fd, ended], [], [])
            if ended in ready:
                return
            events = os.read(fd, 64 * 1024)
            position = 0
            while position < len(events):
                *_, length = _EVENT.unpack_from(events, position)
                position += _EVENT.size + length
                count += 1
                on_event(count)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join()
        os.close(ended)
        os.close(fd)
