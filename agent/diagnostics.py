"""How the VM is: everything that whoever looks into a fault asks first, in one answer."""

from __future__ import annotations

import logging
import math
import os
import resource
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio

from agent.errors import cause_of
from agent.gate import Gate
from agent.introspection import Introspection
from agent.kernel_files import content, counted
from agent.logs import timestamp
from agent.machine import network, use
from agent.machine.cgroup_use import memory_events_of, use_of_cgroup
from agent.machine.mounts import mounts
from agent.machine.pressure import pressure_of_machine
from agent.machine.versions import KnownVersions
from agent.processes.cgroup import CgroupTree
from agent.processes.service import Processes
from agent.processes.standing import StandingContainers
from agent.storage.disk import Disk
from agent.storage.usage import Usage, usage_of
from agent.uptime import uptime_s
from agent.vm_network import VmNetwork
from protocol.machine import (
    AgentCondition,
    Boot,
    BootStep,
    Cgroups,
    Diagnosis,
    LogEntry,
    Missing,
    NetworkCondition,
    Running,
    StorageCondition,
)

log = logging.getLogger(__name__)

# For all parts, which are read at the same time; on a VM in order they take 10 ms.
LIMIT_S = 2.0
# What a part that never ends keeps is its thread. When these are used up, parts are missing.
_THREADS = 32

_COMING_UP = "still coming up"

Value = TypeVar("Value")


@attrs.frozen(kw_only=True)
class Diagnostics:
    """Looks at all parts at once, each in a thread of its own, and waits for none too long."""

    introspection: Introspection
    disk: Disk
    images: Gate[Any]
    network: VmNetwork
    processes: Processes
    standing: StandingContainers
    versions: KnownVersions
    agent_cgroup: Path | None
    """Where init has put the agent, in the image."""
    limit_s: float = LIMIT_S
    _threads: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, _THREADS))

    async def diagnose(self) -> Diagnosis:
        """As of now; what cannot be told, or not in time, is None, and ``missing`` says why."""
        begun = trio.current_time()
        tasks = trio.lowlevel.current_statistics().tasks_living
        parts = await self._read_all(
            {
                "versions": self.versions.read,
                "storage.usage": partial(usage_of, self.disk.directory),
                "storage.writes": self.disk.write_problem,
                "disks": use.disk_devices,
                "mounts": mounts,
                "network.interfaces": network.interfaces,
                "network.routes": network.routes,
                "network.resolv_conf": network.resolv_conf,
                "cgroups": self._cgroups,
                "pressure": pressure_of_machine,
                "oom_kills": use.oom_kills,
                "agent": partial(self._agent, tasks),
                "running": partial(self._running, len(self.standing.all())),
            }
        )
        versions, unknown = parts.told("versions") or (None, {})
        for field, cause in unknown.items():
            parts.miss(f"versions.{field}", cause)
        return Diagnosis(
            time=timestamp(time.time()),
            took_ms=min(int((trio.current_time() - begun) * 1000), 65535),
            versions=versions,
            boot=self._boot(),
            storage=self._storage(parts.told("storage.usage"), parts.told("storage.writes")),
            disks=parts.told("disks"),
            mounts=parts.told("mounts"),
            network=NetworkCondition(
                ready=self.network.gate.is_open,
                error=_failure(self.network.gate),
                problems=self.network.problems,
                interfaces=parts.told("network.interfaces"),
                routes=parts.told("network.routes"),
                resolv_conf=parts.told("network.resolv_conf"),
            ),
            cgroups=parts.told("cgroups"),
            pressure=parts.told("pressure"),
            oom_kills=parts.told("oom_kills"),
            agent=parts.told("agent"),
            running=parts.told("running"),
            log=tuple(
                LogEntry(**attrs.asdict(line)) for line in self.introspection.failures.last()
            ),
            missing=parts.missing,
        )

    async def _read_all(self, readers: Mapping[str, Callable[[], object]]) -> _Parts:
        parts = _Parts()

        async def read(name: str, reader: Callable[[], object]) -> None:
            try:
                parts.tell(
                    name,
                    await trio.to_thread.run_sync(
                        reader, abandon_on_cancel=True, limiter=self._threads
                    ),
                )
            except trio.Cancelled:
                parts.miss(name, f"took longer than {self.limit_s:g} s")
                raise
            except Exception as error:
                if not isinstance(error, OSError):
                    log.exception("diagnose: %s: internal error", name)
                parts.miss(name, cause_of(error))

        with trio.move_on_after(self.limit_s):
            async with trio.open_nursery() as nursery:
                for name, reader in readers.items():
                    nursery.start_soon(read, name, reader)
        return parts

    def _boot(self) -> Boot:
        steps = {
            **self.introspection.steps,
            "storage": self.images.decided_s,
            "network": self.network.gate.decided_s,
        }
        done = sorted((at_s, name) for name, at_s in steps.items() if not math.isnan(at_s))
        return Boot(
            uptime_ms=int(uptime_s() * 1000),
            steps=tuple(BootStep(name, int(at_s * 1000)) for at_s, name in done),
        )

    def _storage(self, usage: Usage | None, problem: str | None) -> StorageCondition:
        ready = self.images.is_open
        return StorageCondition(
            ready=ready and problem is None,
            error=problem if ready and problem else _failure(self.images),
            directory=str(self.disk.directory),
            device=self.disk.device,
            in_memory=self.disk.in_memory,
            # Of a mount point that nothing is mounted on it would be the root's.
            total_bytes=usage.total_bytes if usage and ready else None,
            used_bytes=usage.used_bytes if usage and ready else None,
            free_bytes=usage.free_bytes if usage and ready else None,
        )

    def _cgroups(self) -> Cgroups:
        root = _tree(self.processes).workloads.path.parent
        stat = content(f"{root}/cgroup.stat")
        workloads, agent = root / "workloads", self.agent_cgroup
        return Cgroups(
            controllers=tuple(content(f"{root}/cgroup.controllers").decode().split()),
            descendants=counted(stat, b"nr_descendants") or 0,
            dying=counted(stat, b"nr_dying_descendants") or 0,
            workloads=use_of_cgroup(workloads),
            workloads_memory_events=memory_events_of(workloads),
            agent=None if agent is None else use_of_cgroup(agent),
            agent_memory_events=None if agent is None else memory_events_of(agent),
        )

    def _agent(self, tasks: int) -> AgentCondition:
        process = Path("/proc/self")
        times = os.times()
        pages = int((process / "statm").read_text().split()[1])
        return AgentCondition(
            pid=os.getpid(),
            cpu_us=int((times.user + times.system) * 1_000_000),
            resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            descriptors=sum(1 for _ in (process / "fd").iterdir()),
            descriptors_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            threads=threading.active_count(),
            tasks=tasks,
            connections=self.introspection.hangups.watched,
            oom_score_adj=int((process / "oom_score_adj").read_text()),
        )

    def _running(self, standing: int) -> Running:
        tree = _tree(self.processes)
        cgroups = tree.all()
        commands = [each for each in cgroups if not tree.is_container(each)]
        return Running(
            commands=len(commands),
            background=sum(1 for each in commands if each.told_pid() is not None),
            containers=len(cgroups) - len(commands),
            standing=standing,
        )


@attrs.define
class _Parts:
    """What was told, by the parts' names, and why the others were not."""

    _told: dict[str, Any] = attrs.field(factory=dict)
    _missing: dict[str, str] = attrs.field(factory=dict)

    def tell(self, name: str, value: object) -> None:
        self._told[name] = value

    def miss(self, name: str, cause: str) -> None:
        self._missing[name] = cause

    def told(self, name: str) -> Any:
        return self._told.get(name)

    @property
    def missing(self) -> tuple[Missing, ...]:
        return tuple(Missing(name, cause) for name, cause in sorted(self._missing.items()))


def _failure(gate: Gate[Any]) -> str | None:
    if gate.is_open:
        return None
    return _COMING_UP if gate.failure is None else gate.failure.message


def _tree(processes: Processes) -> CgroupTree:
    if processes.tree is None:
        raise OSError("commands have no cgroups here")
    return processes.tree
