"""Freezing a file system: ioctl(2) with FIFREEZE (linux/fs.h)."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_FIFREEZE = 0xC0045877  # _IOWR('X', 119, int)


def fifreeze(directory: Path) -> None:
    """Bring what the file system at ``directory`` has on its disk in order, and let nobody change
    it any more: whoever tries waits.

    Raises:
        OSError: it cannot be frozen, or it is (EBUSY).
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _FIFREEZE, 0)
    finally:
        os.close(descriptor)
