"""How long after boot things happen, with the time that the machine slept."""

from __future__ import annotations

import os
import time
from pathlib import Path


def uptime_s() -> float:
    """Now."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def started_s() -> float:
    """When this process began, to a hundredth of a second: proc_pid_stat(5)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
