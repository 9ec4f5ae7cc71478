"""What it costs to have the agent pack and unpack a directory, instead of running tar oneself.

Both sides are in a machine of namespaces, on the same file system; `guest.trees` runs there.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from benchmarks.guest.python import python
from benchmarks.guest.trees import ROWS
from benchmarks.machine import booted_with_image

__all__ = ["ROWS", "measure"]


def measure(rootfs: Path, rows: Sequence[str] = (), *, quick: bool = False) -> None:
    """Print the table, or the named rows; ``quick`` is for trying, its figures mean little."""
    # SIGTERM unwinds like ^C, so that neither the machine nor the registry is left behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with booted_with_image(rootfs.parent) as (machine, _):
            for row in rows or ROWS:
                machine.run(python("benchmarks.guest.trees", row, *(["--quick"] * quick)))
    finally:
        signal.signal(signal.SIGTERM, before)
