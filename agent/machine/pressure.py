"""Pressure stall information: Documentation/accounting/psi.rst."""

from __future__ import annotations

import errno
from pathlib import Path

from agent.errors import cause_of
from protocol.machine import Pressure, ResourcePressure, Stall

_FOLDER = Path("/proc/pressure")


def pressure_of_machine(folder: Path = _FOLDER) -> Pressure:
    """What waits for the processors, for memory and for disks.

    Raises:
        OSError: this kernel does not count it; says why.
    """
    try:
        return Pressure(*(_read(folder / name) for name in ("cpu", "memory", "io")))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):
            raise
        cause = f"the kernel counts no pressure (psi=1 turns it on): {cause_of(error)}"
        raise OSError(cause) from error


def _read(path: Path) -> ResourcePressure:
    lines = path.read_text(encoding="ascii").splitlines()
    stalls = {line.partition(" ")[0]: _stall(line) for line in lines}
    return ResourcePressure(stalls.get("some"), stalls.get("full"))


def _stall(line: str) -> Stall:
    """Of a line such as ``some avg10=0.00 avg60=0.00 avg300=0.00 total=0``."""
    values = dict(pair.partition("=")[::2] for pair in line.split()[1:])
    return Stall(
        avg10=float(values["avg10"]),
        avg60=float(values["avg60"]),
        avg300=float(values["avg300"]),
        total_us=int(values["total"]),
    )
