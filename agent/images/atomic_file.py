"""Files that are there whole or not at all, also after a power loss."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, data: bytes, temporary_dir: Path) -> None:
    """Make `path` hold `data`: temporary file, sync, rename, sync of the directory.

    ``temporary_dir`` is on the same file system; whoever owns it removes what a crash leaves
    there. On an OSError nothing is left and `path` is as it was.
    """
    temporary = write_temporary(data, temporary_dir)
    try:
        sync_file(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_temporary(data: bytes, directory: Path) -> Path:
    """A new file that holds `data`, still to be synced; on an OSError there is none."""
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def sync_file(path: Path) -> None:
    """Make what was written to a file durable."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Make names that were added to or removed from a directory durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
