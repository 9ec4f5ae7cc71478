"""Files that are there whole or not at all, also after a power loss."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from agent.linux.writeback import sync_file_range

# So many bytes of a large file are handed to the disk at a time while it is written: then it works
# meanwhile, and the sync at the end is short.
WRITEBACK_BYTES = 8 << 20


@attrs.frozen
class Naming:
    """A file that is written, and the name that it gets in the same file system."""

    source: Path
    target: Path


def publish(groups: Sequence[Sequence[Naming]]) -> list[OSError | None]:
    """Let all files have their names, those of a group all or none of them; the failures of each.

    All are synced before any is renamed, and then each directory once: a sync waits for the file
    system's journal, and the next one finds that done, so that many cost little more than one.
    """
    failures: list[OSError | None] = [None] * len(groups)

    @contextmanager
    def failing(*numbers: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            for number in numbers:
                failures[number] = error

    # With all of them under way, one commit of the journal has what each of them needs in it.
    for work in (begin_writeback, sync_file):
        for number, group in enumerate(groups):
            with failing(number):
                for naming in group:
                    work(naming.source)
    directories: dict[Path, list[int]] = {}
    for number, group in enumerate(groups):
        if failures[number] is None:
            with failing(number):
                for naming in group:
                    naming.source.replace(naming.target)
                    directories.setdefault(naming.target.parent, []).append(number)
    for directory, numbers in directories.items():
        with failing(*numbers):
            sync_directory(directory)
    return failures


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


def begin_writeback(path: Path) -> None:
    """Have the disk write what there is of a file by now."""
    with path.open("rb") as file:
        sync_file_range(file.fileno())


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
