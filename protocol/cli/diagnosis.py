"""What ``innkeep diagnose`` prints."""

from collections.abc import Iterable, Iterator

from rich.filesize import decimal
from rich.text import Text

from protocol.cli.output import console, short_digest
from protocol.machine import (
    CgroupUse,
    Diagnosis,
    NetworkCondition,
    ResourcePressure,
    StorageCondition,
)

_MOST_LOG_LINES = 20


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """A heading for each part, and lines below it; what is missing, and why, at the end."""
    to = console()
    for heading, told in _parts(diagnosis):
        lines = list(told)
        if lines:
            to.print(Text(heading, style="bold"))
        for line in lines:
            to.print(Text(f"  {line}"), soft_wrap=True)


def _parts(told: Diagnosis) -> Iterator[tuple[str, Iterable[str]]]:
    yield "versions", _versions(told)
    yield "boot", _boot(told)
    yield "storage", _storage(told.storage)
    yield (
        "disks",
        [
            f"{disk.name} {decimal(disk.size_bytes)}{', read-only' * disk.read_only}"
            for disk in told.disks or ()
        ],
    )
    yield "network", _network(told.network)
    if told.mounts is not None:
        more = [f"and {told.mounts.left_out} more"] if told.mounts.left_out else []
        points = told.mounts.points
        yield "mounts", [*(f"{at.path} {at.kind} {at.source} {at.options}" for at in points), *more]
    yield "load", _load(told)
    yield "agent", _agent(told)
    yield (
        "last failures",
        [
            f"{line.ts} {line.level} {line.message}{_traced(line.trace_id)}"
            for line in told.log[-_MOST_LOG_LINES:]
        ],
    )
    yield "not known", [f"{each.part}: {each.cause}" for each in told.missing]


def _traced(trace_id: str | None) -> str:
    return "" if trace_id is None else f" (trace {trace_id})"


def _versions(told: Diagnosis) -> Iterator[str]:
    versions = told.versions
    if versions is None:
        return
    yield f"innkeep {versions.agent}, protocol {versions.protocol}"
    programs = {"crun": versions.crun, "erofs-utils": versions.erofs_utils}
    known = [f"{name} {version}" for name, version in programs.items() if version is not None]
    yield ", ".join([f"Linux {versions.kernel}", f"Python {versions.python}", *known])
    if versions.image is not None:
        yield f"image {short_digest(versions.image)}"


def _boot(told: Diagnosis) -> Iterator[str]:
    yield f"up for {told.boot.uptime_ms / 1000:.0f} s, at {told.time}"
    if told.boot.steps:
        yield ", ".join(f"{step.name} {step.at_ms / 1000:.3f} s" for step in told.boot.steps)


def _storage(storage: StorageCondition) -> Iterator[str]:
    place = storage.device or ("memory" if storage.in_memory else "a directory")
    yield f"{'ready' if storage.ready else 'not ready'}: {place} at {storage.directory}"
    if storage.error is not None:
        yield storage.error
    if storage.used_bytes is not None and storage.total_bytes is not None:
        yield f"{decimal(storage.used_bytes)} of {decimal(storage.total_bytes)} used"


def _network(network: NetworkCondition) -> Iterator[str]:
    yield "ready" if network.error is None else f"not ready: {network.error}"
    if network.error is None:
        yield from network.problems
    for link in network.interfaces or ():
        state = ("up" if link.carrier else "up, no carrier") if link.up else "down"
        addresses = "".join(f" {address}" for address in link.addresses)
        yield f"{link.name} {state}, {link.mac}, mtu {link.mtu}{addresses}"
    for route in network.routes or ():
        via = "" if route.gateway is None else f" via {route.gateway}"
        yield f"{route.destination}{via} on {route.interface}"
    lines = (network.resolv_conf or "").splitlines()
    yield from (line for line in lines if line and not line.startswith("#"))


def _load(told: Diagnosis) -> Iterator[str]:
    if told.pressure is not None:
        for name, of in (
            ("cpu", told.pressure.cpu),
            ("memory", told.pressure.memory),
            ("io", told.pressure.io),
        ):
            yield f"waiting for {name}: {_stalls(of)}"
    if told.oom_kills is not None:
        yield f"{told.oom_kills} processes killed for memory since boot"
    if told.running is not None:
        running = told.running
        yield (
            f"{running.commands} commands in the VM, {running.background} in the background; "
            f"{running.containers} containers, {running.standing} that stay"
        )
    if told.cgroups is not None:
        cgroups = told.cgroups
        yield f"{cgroups.descendants} cgroups, {cgroups.dying} that are going"
        for name, use in (("workloads", cgroups.workloads), ("agent", cgroups.agent)):
            if use is not None and use.memory_bytes is not None:
                yield f"{name}: {_cgroup(use)}"


def _stalls(pressure: ResourcePressure) -> str:
    kinds = {"some": pressure.some, "all": pressure.full}
    return ", ".join(
        f"{name} {stall.avg10:.1f}% of 10 s, {stall.avg60:.1f}% of 60 s"
        for name, stall in kinds.items()
        if stall is not None
    )


def _cgroup(use: CgroupUse) -> str:
    memory = _of(
        decimal(use.memory_bytes or 0), use.memory_limit_bytes and decimal(use.memory_limit_bytes)
    )
    peak = "" if use.memory_peak_bytes is None else f" (at most {decimal(use.memory_peak_bytes)})"
    pids = "" if use.pids is None else f", {_of(str(use.pids), use.pids_limit)} processes"
    return f"{memory} memory{peak}{pids}"


def _of(number: str, limit: object) -> str:
    return number if limit is None else f"{number} of {limit}"


def _agent(told: Diagnosis) -> Iterator[str]:
    agent = told.agent
    if agent is None:
        return
    yield (
        f"process {agent.pid}: {decimal(agent.resident_bytes)} resident, "
        f"{agent.cpu_us / 1_000_000:.1f} s of processor time"
    )
    yield (
        f"{agent.descriptors} of {agent.descriptors_limit} descriptors, {agent.threads} threads, "
        f"{agent.tasks} tasks, {agent.connections} connections"
    )
