"""What the next agent has to know of the workload; a file beside its log."""

from __future__ import annotations

from pathlib import Path

import attrs
import orjson

from agent.processes.cgroup import Cgroup
from agent.workload.end import End
from agent.workload.place import Group

_NAME = "workload.json"


@attrs.frozen(kw_only=True)
class RunRecord:
    """A run of the workload that has begun; ``ticks`` tell its ``pid`` from a later one."""

    is_boots: bool
    pid: int
    """Of the shell that keeps its exit status."""
    ticks: int
    leader: int
    cgroup: str | None
    in_container: bool
    stopped: bool = False

    @property
    def group(self) -> Group:
        cgroup = None if self.cgroup is None else Cgroup(Path(self.cgroup))
        return Group(self.leader, cgroup, self.in_container)


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
