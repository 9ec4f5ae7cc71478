"""Giving whole files their names, so that a power loss finds each there whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from agent.images.atomic_file import sync_directory, sync_file


@attrs.frozen
class Naming:
    """A file that is written, and the name that it gets in the same file system."""

    source: Path
    target: Path


@attrs.define(eq=False)
class _Request:
    namings: Sequence[Naming]
    is_done: bool = False
    error: OSError | None = None


class GroupCommit:
    """Syncs and renames files, those of all threads that ask for it meanwhile at once.

    Each sync waits for the file system's journal, and one such wait serves all that was written
    before it: for forty small layers that is nearly all of their time.
    """

    def __init__(self) -> None:
        self._queue: list[_Request] = []
        self._queueing = threading.Lock()
        self._committing = threading.Lock()

    def publish(self, namings: Sequence[Naming]) -> None:
        """Return when the files have their names and both are on the disk.

        Raises:
            OSError: one cannot be synced or renamed; those before it may have their names.
        """
        request = _Request(namings)
        with self._queueing:
            self._queue.append(request)
        with self._committing:
            # Whoever had the lock before may have seen to ours.
            if not request.is_done:
                with self._queueing:
                    group, self._queue = self._queue, []
                _commit(group)
        if request.error is not None:
            raise request.error


def _commit(group: Sequence[_Request]) -> None:
    """Sync all files before any is renamed, and then the directories, once each."""
    for request in group:
        with _failing(request):
            for naming in request.namings:
                sync_file(naming.source)
    directories: dict[Path, list[_Request]] = {}
    for request in group:
        with _failing(request):
            _rename_all(request)
            for naming in request.namings:
                directories.setdefault(naming.target.parent, []).append(request)
    for directory, requests in directories.items():
        with _failing(*requests):
            sync_directory(directory)
    for request in group:
        request.is_done = True


def _rename_all(request: _Request) -> None:
    if request.error is not None:
        raise request.error
    for naming in request.namings:
        naming.source.replace(naming.target)


@contextmanager
def _failing(*requests: _Request) -> Iterator[None]:
    """What fails is for those to know who asked for it, and for nobody else."""
    try:
        yield
    except OSError as error:
        for request in requests:
            request.error = error
