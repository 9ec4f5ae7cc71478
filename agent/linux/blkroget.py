"""Whether a block device is read-only: ioctl(2) with BLKROGET (linux/fs.h)."""

from __future__ import annotations

import fcntl

_BLKROGET = 0x125E  # _IO(0x12, 94)


def blkroget(descriptor: int) -> bool:
    """Whether the device that is open takes no writes, whoever asks.

    Raises:
        OSError: ENOTTY, for what is no block device.
    """
    return any(fcntl.ioctl(descriptor, _BLKROGET, bytes(4)))
