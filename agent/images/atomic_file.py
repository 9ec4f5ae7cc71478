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
    descriptor, name = tempfile.mkstemp(dir=temporary_dir)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make names that were added to or removed from a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
