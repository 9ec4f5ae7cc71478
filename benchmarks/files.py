"""What it costs to have the agent write and read files, instead of doing it oneself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.guest.table import FILES
from benchmarks.processes import measure_in_machine

ROWS = tuple(FILES)


def measure(rootfs: Path, rows: Sequence[str] = (), *, quick: bool = False) -> None:
    """Print the table, or the named rows; ``quick`` is for trying, its figures mean little."""
    measure_in_machine(rootfs, rows or ROWS, quick=quick)
