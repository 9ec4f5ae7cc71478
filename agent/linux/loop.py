"""Loop devices (loop(4)), for EROFS images that the kernel mounts only from a block device:
all of them before Linux 6.12, and those on a tmpfs."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Documentation/admin-guide/devices.txt
LOOP_MAJOR = 7
# linux/loop.h
LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4

# struct loop_config: fd, block_size, struct loop_info64 (lo_flags at byte 52 of its 232), reserved.
_LOOP_CONFIG = struct.Struct("=II52xI176x64x")


@contextmanager
def loop_device(path: str | os.PathLike[str]) -> Iterator[str]:
    """A read-only loop device of a file, "/dev/loop7".

    It clears itself: after the block with the last mount of it, or with the block without one.

    Raises:
        OSError: no loop driver (ENOENT), or what its ioctls say.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device, name = _configured(file)
    finally:
        os.close(file)
    try:
        yield name
    finally:
        os.close(device)


def _configured(file: int) -> tuple[int, str]:
    config = _LOOP_CONFIG.pack(file, 0, LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            name = f"/dev/loop{number}"
            device = _opened(name, number)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                # Another process took this one in between; the next that is free, then.
                if error.errno != errno.EBUSY:
                    raise
            else:
                return device, name
    finally:
        os.close(control)


def _opened(name: str, number: int) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        # The driver has just made the device, and a /dev that is no devtmpfs has no node for it.
        # Another thread may have got the same number, which is free until one of them takes it.
        with suppress(FileExistsError):
            os.mknod(name, stat.S_IFBLK | 0o600, os.makedev(LOOP_MAJOR, number))
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)
