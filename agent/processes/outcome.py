"""How a command ended, and what it took."""

from __future__ import annotations

import attrs

TIMED_OUT = 124
"""The exit code of a command that its time limit ended, as timeout(1) has it."""


@attrs.frozen(kw_only=True)
class Outcome:
    """A command's end, and that of everything it had running in the foreground."""

    exit_code: int
    """Its status, 128 plus the signal that ended it, or ``TIMED_OUT``."""
    signal: int | None = None
    """The signal that ended it, where the agent can know: a container's runtime does not tell."""
    timed_out: bool = False
    oom: bool = False
    """Whether the kernel killed a process of it because memory ran out."""
    duration_ms: int | None = attrs.field(default=None, eq=False)
    cpu_us: int | None = attrs.field(default=None, eq=False)
    """Processor time of all its processes, user's and system's."""
    peak_memory_bytes: int | None = attrs.field(default=None, eq=False)
    """The most that its cgroup held, caches included; without a memory controller the largest
    resident size of a single process of it."""
