"""What it costs to have the agent run a command, instead of running it oneself.

Both sides of each row are the image's own Python, in a machine of namespaces: ``guest`` holds what
runs there. References are named in the rows.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from benchmarks.guest.python import python
from benchmarks.guest.table import ROWS
from benchmarks.machine import booted_with_image

__all__ = ["ROWS", "measure", "measure_in_machine"]


def measure(rootfs: Path, rows: Sequence[str] = (), *, quick: bool = False) -> None:
    """Print the table, or the named rows; ``quick`` is for trying, its figures mean little."""
    measure_in_machine(rootfs, rows or tuple(ROWS), quick=quick)


def measure_in_machine(rootfs: Path, rows: Sequence[str], *, quick: bool) -> None:
    """Print rows that are measured inside a machine of namespaces."""
    # SIGTERM unwinds like ^C, so that neither the machine nor the registry is left behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with booted_with_image(rootfs.parent) as (machine, image):
            options = ["--quick"] if quick else []
            for row in rows:
                # A process for each row: no row finds the memory and the descriptors of another.
                machine.run(python("benchmarks.guest", row, image, *options))
    finally:
        signal.signal(signal.SIGTERM, before)
