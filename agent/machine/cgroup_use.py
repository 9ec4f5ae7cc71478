"""What a cgroup uses: Documentation/admin-guide/cgroup-v2.rst."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from agent.kernel_files import as_number, content, counted
from protocol.machine import CgroupUse, MemoryEvents

# The fields that files hold, by the files.
_MEMORY = {
    "memory.current": "memory_bytes",
    "memory.peak": "memory_peak_bytes",
    "memory.max": "memory_limit_bytes",
    "memory.swap.current": "swap_bytes",
}
_PIDS = {"pids.current": "pids", "pids.max": "pids_limit"}

Use = TypeVar("Use", bound=CgroupUse)


def use_of_cgroup(directory: Path) -> CgroupUse | None:
    """What has been counted of it; None if it is gone. A controller that is not there counts
    nothing."""
    return use_as(CgroupUse, directory)


def use_as(kind: type[Use], directory: Path, **more: Any) -> Use | None:
    """The same with fields that the caller knows, as one of the values that have these, too."""
    where = str(directory)
    cpu = content(f"{where}/cpu.stat")
    if not cpu:
        return None
    numbers: dict[str, Any] = dict.fromkeys((*_MEMORY.values(), *_PIDS.values()))
    for files in (_MEMORY, _PIDS):
        for file, field in files.items():
            if (found := content(f"{where}/{file}")) == b"":
                break  # without its controller: nor are the others there
            numbers[field] = as_number(found)
    has_memory = numbers["memory_bytes"] is not None
    read_bytes, written_bytes = _io(f"{where}/io.stat")
    return kind(
        cpu_us=counted(cpu, b"usage_usec"),
        user_us=counted(cpu, b"user_usec"),
        system_us=counted(cpu, b"system_usec"),
        **numbers,
        read_bytes=read_bytes,
        written_bytes=written_bytes,
        oom_kills=counted(content(f"{where}/memory.events"), b"oom_kill") if has_memory else None,
        **more,
    )


def memory_events_of(directory: Path) -> MemoryEvents | None:
    """How often it ran into a limit; None where no controller counts that."""
    events = content(f"{directory}/memory.events")
    if not events:
        return None
    names = ("high", "max", "oom", "oom_kill")
    return MemoryEvents(**{name: counted(events, name.encode()) or 0 for name in names})


def _io(path: str) -> tuple[int | None, int | None]:
    """The bytes read and written, of lines such as ``254:0 rbytes=4096 wbytes=0 …``."""
    stat = content(path, 65536)
    if not stat and not os.path.exists(path):  # noqa: PTH110 for every cgroup
        return None, None
    words = [word.partition(b"=") for word in stat.split()]
    read, written = (
        sum(int(value) for name, _, value in words if name == key) for key in (b"rbytes", b"wbytes")
    )
    return read, written
