"""The kernel's small files, in /proc, /sys and cgroup2, read in as few system calls as can be."""

from __future__ import annotations

import os


def content(path: str, limit_bytes: int = 4096) -> bytes:
    """What a file holds, as far as one read gives it; nothing if it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(file, limit_bytes)
    except OSError:
        return b""
    finally:
        os.close(file)


def counted(content: bytes, key: bytes) -> int | None:
    """The number beside ``key`` in a flat keyed file."""
    for line in content.splitlines():
        name, _, value = line.partition(b" ")
        if name == key:
            return int(value)
    return None


def as_number(content: bytes) -> int | None:
    """The one number that a file holds; None for "max", and where there was nothing to read."""
    text = content.strip()
    return int(text) if text.isdigit() else None
