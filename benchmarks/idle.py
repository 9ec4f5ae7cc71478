"""What the agent takes of a processor while nobody asks anything of it.

Natively, in a machine of namespaces that has pulled an image before: ticks of its process, as
proc_pid_stat(5) counts them, and how often one of its threads was woken.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from benchmarks.machine import booted_with_image

# Threads that have had nothing to do for ten seconds end.
SETTLING_S = 15
WATCHED_S = 60


def measure(rootfs: Path) -> None:
    """Print the figures of a minute."""
    with booted_with_image(rootfs.parent) as (machine, _):
        pid = machine.agent_pid
        time.sleep(SETTLING_S)
        ticks, wake_ups = _ticks(pid), _wake_ups(pid)
        time.sleep(WATCHED_S)
        ticks, wake_ups = _ticks(pid) - ticks, _wake_ups(pid) - wake_ups
    tick_ms = 1000 // os.sysconf("SC_CLK_TCK")
    print(f"idle for {WATCHED_S} s: {ticks} ticks of {tick_ms} ms, {wake_ups} wake-ups")


def _ticks(pid: int) -> int:
    """Its processor time, in the kernel's and in its own code."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _wake_ups(pid: int) -> int:
    return sum(
        int(count)
        for status in Path(f"/proc/{pid}/task").glob("*/status")
        for count in re.findall(r"(?m)^voluntary_ctxt_switches:\t(\d+)$", status.read_text())
    )
