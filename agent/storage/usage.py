"""How much of the storage is used."""

from __future__ import annotations

import os
from pathlib import Path

import attrs


@attrs.frozen
class Usage:
    total_bytes: int
    used_bytes: int
    free_bytes: int
    """What an unprivileged writer could still write (statvfs(3)'s f_bavail)."""


def usage_of(directory: Path) -> Usage:
    """The file system that ``directory`` is on, as df(1) counts it.

    Raises:
        OSError: the directory is not there.
    """
    found = os.statvfs(directory)
    return Usage(
        total_bytes=found.f_blocks * found.f_frsize,
        used_bytes=(found.f_blocks - found.f_bfree) * found.f_frsize,
        free_bytes=found.f_bavail * found.f_frsize,
    )
