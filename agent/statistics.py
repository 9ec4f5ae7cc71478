"""What the VM uses, all in all and by each of its containers and commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import attrs
import trio

from agent.errors import cause_of
from agent.images.workload_id import persistent_overlay_id
from agent.kernel_files import content
from agent.machine.cgroup_use import use_as, use_of_cgroup
from agent.machine.pressure import pressure_of_machine
from agent.machine.use import cpu_use, interface_uses, io_use, memory_use, oom_kills
from agent.processes.cgroup import Cgroup, CgroupTree
from agent.processes.service import Processes
from agent.processes.standing import StandingContainers
from agent.uptime import uptime_s
from protocol.machine import CgroupUse, CommandUse, ContainerUse, Missing, Pressure, VmStats

# Containers and commands in one answer, 300 bytes each.
_MOST_CGROUPS = 1000
# Hosts that ask more often than they can be answered wait for each other.
_READERS = 2

# What a controller counts, and the field that tells whether it is there.
_CONTROLLERS = {"memory": "memory_bytes", "pids": "pids", "io": "read_bytes"}

Reading = Callable[[], ContainerUse | CommandUse | None]


@attrs.frozen
class _Standing:
    """What is known of a container that stays, beside its cgroup."""

    overlay: str
    pid: int


@attrs.frozen
class Statistics:
    """Reads the kernel's counters; nothing is kept from one answer to the next.

    ``agent_cgroup`` is where init has put the agent, in the image.
    """

    _processes: Processes
    _standing: StandingContainers
    _agent_cgroup: Path | None
    _readers: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, _READERS))

    async def read(self) -> VmStats:
        """As of now. Raises OSError: /proc is not what it should be."""
        standing = {
            each.id: _Standing(persistent_overlay_id(each.workload), each.pid)
            for each in self._standing.all()
        }
        return await trio.to_thread.run_sync(self._read, standing, limiter=self._readers)

    def _read(self, standing: Mapping[str, _Standing]) -> VmStats:
        missing: list[Missing] = []
        pressure = _pressure(missing)
        tree = self._processes.tree
        readings = iter(()) if tree is None else _readings(tree, standing)
        looked_at = islice(readings, _MOST_CGROUPS)
        uses = [use for reading in looked_at if (use := reading()) is not None]
        return VmStats(
            uptime_ms=int(uptime_s() * 1000),
            cpu=cpu_use(),
            memory=memory_use(),
            io=io_use(),
            network=interface_uses(),
            pressure=pressure,
            oom_kills=oom_kills(),
            workloads=_of_workloads(tree, missing),
            agent=_of_agent(self._agent_cgroup, missing),
            containers=tuple(use for use in uses if isinstance(use, ContainerUse)),
            commands=tuple(use for use in uses if isinstance(use, CommandUse)),
            left_out=sum(1 for _ in readings),
            missing=tuple(missing),
        )


def _readings(tree: CgroupTree, standing: Mapping[str, _Standing]) -> Iterator[Reading]:
    """How to read each container, and each command that a host knows by its pid."""
    for cgroup in tree.all():
        if not tree.is_container(cgroup):
            yield from _of_command(cgroup, None)
            continue
        known = standing.get(cgroup.path.name)
        yield partial(_container, cgroup, known)
        if known is not None:
            with suppress(FileNotFoundError):  # it has ended
                for inner in Cgroup.all_in(cgroup.path):
                    yield from _of_command(inner, cgroup.path.name)


def _of_command(cgroup: Cgroup, container: str | None) -> Iterator[Reading]:
    pid = cgroup.told_pid()
    if pid is not None:
        yield partial(
            use_as, CommandUse, cgroup.path, pid=pid, container=container, program=_program(pid)
        )


def _container(cgroup: Cgroup, known: _Standing | None) -> ContainerUse | None:
    return use_as(
        ContainerUse,
        cgroup.path,
        id=cgroup.path.name,
        overlay=known and known.overlay,
        pid=known and known.pid,
        program=known and _program(known.pid),
    )


def _program(pid: int) -> str | None:
    """Its name alone: arguments may be secret."""
    name = content(f"/proc/{pid}/comm")
    return name.decode(errors="replace").rstrip("\n") if name else None


def _pressure(missing: list[Missing]) -> Pressure | None:
    try:
        return pressure_of_machine()
    except OSError as error:
        missing.append(Missing("pressure", cause_of(error)))
        return None


def _of_workloads(tree: CgroupTree | None, missing: list[Missing]) -> CgroupUse | None:
    use = None if tree is None else use_of_cgroup(tree.workloads.path)
    if use is None:
        missing.append(Missing("workloads", "commands have no cgroups here"))
        return None
    missing += [
        Missing(f"workloads.{field}", f"this cgroup2 hierarchy has no {controller} controller")
        for controller, field in _CONTROLLERS.items()
        if getattr(use, field) is None
    ]
    return use


def _of_agent(cgroup: Path | None, missing: list[Missing]) -> CgroupUse | None:
    use = None if cgroup is None else use_of_cgroup(cgroup)
    if use is None:
        missing.append(Missing("agent", "the agent runs outside its image"))
    return use
