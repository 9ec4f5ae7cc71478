"""How far a copy is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ByteBar:
    """A progress bar on stderr that counts bytes; see ``byte_bar``."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=None)

    def expect(self, total_bytes: int | None) -> None:
        """Tell how many bytes there will be; without knowing, the bar only moves."""
        self._progress.update(self._task, total=total_bytes)

    def advance(self, count_bytes: int) -> None:
        """So many more have been copied."""
        self._progress.advance(self._task, count_bytes)


@contextmanager
def byte_bar(name: str, *, quiet: bool) -> Iterator[ByteBar]:
    """A bar for the block; it leaves no trace, and is not shown where stderr is no terminal."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or sys.stderr is None or not sys.stderr.isatty(),
        transient=True,
    )
    with progress:
        yield ByteBar(progress, name)
