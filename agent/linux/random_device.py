"""The kernel's random number generator: ioctl(2) on /dev/random, random(4). For root alone."""

from __future__ import annotations

import fcntl
import struct

# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07)
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207


def rndaddentropy(descriptor: int, data: bytes) -> None:
    """Mix ``data`` in, and count every bit of it: for bytes that nobody else knows."""
    # As it lies in memory: what may not be changed is copied, and may have 1,024 bytes.
    pool = bytearray(struct.pack("=ii", 8 * len(data), len(data)) + data)
    fcntl.ioctl(descriptor, RNDADDENTROPY, pool)


def rndreseedcrng(descriptor: int) -> None:
    """Have what was mixed in decide over the very next number, rather than within a minute."""
    fcntl.ioctl(descriptor, RNDRESEEDCRNG)
