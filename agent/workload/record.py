"""What the next agent has to know of the workload; a file beside its log.

It is written when there is a process, and before that executes anything.
"""

from __future__ import annotations

from pathlib import Path

import attrs
import orjson

from agent.processes.cgroup import Cgroup
from agent.workload.end import End

_NAME = "workload.json"


@attrs.frozen(kw_only=True)
class RunRecord:
    """A run of the workload that is about to begin, or has; ``ticks`` tell ``pid`` from others."""

    is_boots: bool
    keeper: str
    """The name of its directory."""
    pid: int
    """Of the shell that keeps its exit status."""
    ticks: int
    cgroup_path: str | None
    in_container: bool
    leader: int | None = None
    """The command's pid, once that is known."""
    stop_until: float | None = None
    """When what is left of it is to be killed, on CLOCK_BOOTTIME; None where nobody wants that."""

    @property
    def cgroup(self) -> Cgroup | None:
        return None if self.cgroup_path is None else Cgroup(Path(self.cgroup_path))


@attrs.frozen(kw_only=True)
class Record:
    """Which run there is, and how the boot's last one ended."""

    run: RunRecord | None = None
    boots_end: End | None = None

    @classmethod
    def read(cls, directory: Path) -> Record:
        """That of an earlier agent; an empty one where there is none that is whole. Blocks."""
        try:
            document = orjson.loads((directory / _NAME).read_bytes())
            run, end = document["run"], document["boots_end"]
            return cls(
                run=None if run is None else RunRecord(**run),
                boots_end=None if end is None else End(**end),
            )
        except (OSError, ValueError, TypeError, KeyError):
            return cls()

    def write(self, directory: Path) -> None:
        """Keep it, whole or not at all. Blocks; raises OSError."""
        new = directory / f"{_NAME}.new"
        new.write_bytes(orjson.dumps(attrs.asdict(self)))
        new.replace(directory / _NAME)
