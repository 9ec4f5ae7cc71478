"""Values that tell how the VM is: what it uses, and what is the matter with it.

Whatever a kernel does not count is None; ``missing`` says why, where that is not the same for all.
Counters, of bytes and of microseconds (``*_us``), are since boot or since the cgroup was made.
"""

import attrs

from protocol.values import I32, U16, U32, U64


@attrs.frozen
class Missing:
    """Why a part of an answer is None; ``part`` is its name, with dots between those above it."""

    part: str
    cause: str


@attrs.frozen
class Stall:
    """For how much of the last 10, 60 and 300 s something waited, in percent; how long in all."""

    avg10: float
    avg60: float
    avg300: float
    total_us: U64


@attrs.frozen
class ResourcePressure:
    """``some``: at least one process waited for the resource; ``full``: all that had work did."""

    some: Stall | None
    full: Stall | None


@attrs.frozen
class Pressure:
    """Pressure stall information, by resource."""

    cpu: ResourcePressure
    memory: ResourcePressure
    io: ResourcePressure


@attrs.frozen(kw_only=True)
class CpuUse:
    """Of all processors; ``usage_us`` is what they worked, ``steal_us`` what the host kept."""

    count: U32
    usage_us: U64
    user_us: U64
    system_us: U64
    iowait_us: U64
    steal_us: U64
    load1: float
    load5: float
    load15: float


@attrs.frozen(kw_only=True)
class MemoryUse:
    """``available_bytes``: what could be had without swapping; ``cache_bytes``: files' pages."""

    total_bytes: U64
    available_bytes: U64
    free_bytes: U64
    cache_bytes: U64
    swap_total_bytes: U64
    swap_free_bytes: U64


@attrs.frozen(kw_only=True)
class IoUse:
    """Of all disks."""

    read_bytes: U64
    written_bytes: U64
    reads: U64
    writes: U64


@attrs.frozen(kw_only=True)
class InterfaceUse:
    """Of one network interface."""

    name: str
    received_bytes: U64
    received_packets: U64
    received_dropped: U64
    received_errors: U64
    sent_bytes: U64
    sent_packets: U64
    sent_dropped: U64
    sent_errors: U64


@attrs.frozen(kw_only=True)
class CgroupUse:
    """Of a cgroup and all below it; a limit is None where there is none."""

    cpu_us: U64 | None
    user_us: U64 | None
    system_us: U64 | None
    memory_bytes: U64 | None
    memory_peak_bytes: U64 | None
    memory_limit_bytes: U64 | None
    swap_bytes: U64 | None
    pids: U64 | None
    pids_limit: U64 | None
    read_bytes: U64 | None
    written_bytes: U64 | None
    oom_kills: U64 | None


@attrs.frozen(kw_only=True)
class ContainerUse(CgroupUse):
    """``overlay`` is the persistent_overlay_id of one that stays; another ends with its command.

    ``pid`` is its first process's, ``program`` that one's name; both only of one that stays.
    """

    id: str
    overlay: str | None
    pid: U32 | None
    program: str | None


@attrs.frozen(kw_only=True)
class CommandUse(CgroupUse):
    """A command in the background, by the pid that was answered; ``container`` is what it is in."""

    pid: U32
    container: str | None
    program: str | None


@attrs.frozen(kw_only=True)
class VmStats:
    """What the VM uses, capability ``vm-stats-v1``.

    ``oom_kills`` are the VM's, ``workloads`` all commands and containers together, and
    ``left_out`` is how many more of these there are than were looked at.
    """

    uptime_ms: U64
    cpu: CpuUse
    memory: MemoryUse
    io: IoUse
    network: tuple[InterfaceUse, ...]
    pressure: Pressure | None
    oom_kills: U64 | None
    workloads: CgroupUse | None
    agent: CgroupUse | None
    containers: tuple[ContainerUse, ...]
    commands: tuple[CommandUse, ...]
    left_out: U64
    missing: tuple[Missing, ...]


@attrs.frozen(kw_only=True)
class Versions:
    """``image`` is the build that the VM was booted from: ``key`` in its manifest.json."""

    agent: str
    protocol: U32
    python: str
    kernel: str
    crun: str | None
    erofs_utils: str | None
    image: str | None


@attrs.frozen
class BootStep:
    """A step of the agent's start that is done."""

    name: str
    at_ms: U64
    """After boot."""


@attrs.frozen(kw_only=True)
class Boot:
    """How long the VM runs, and what it did when."""

    uptime_ms: U64
    steps: tuple[BootStep, ...]


@attrs.frozen(kw_only=True)
class MountPoint:
    """One line of mountinfo; ``options`` are cut where they are long."""

    path: str
    source: str
    kind: str
    options: str


@attrs.frozen(kw_only=True)
class Mounts:
    """In the agent's mount namespace; ``left_out`` more are there."""

    points: tuple[MountPoint, ...]
    left_out: U64


@attrs.frozen(kw_only=True)
class DiskDevice:
    """A block device that is not a part of another."""

    name: str
    size_bytes: U64
    read_only: bool


@attrs.frozen(kw_only=True)
class StorageCondition:
    """``device`` is None where storage lives in memory or is a directory; ``error`` is what keeps
    it from being ready, if anything does."""

    ready: bool
    error: str | None
    directory: str
    device: str | None
    in_memory: bool
    total_bytes: U64 | None
    used_bytes: U64 | None
    free_bytes: U64 | None


@attrs.frozen(kw_only=True)
class Interface:
    """``addresses`` have their prefix length."""

    name: str
    up: bool
    carrier: bool
    mac: str
    mtu: U32
    addresses: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Route:
    """``gateway`` is None where the destination is on the link."""

    destination: str
    gateway: str | None
    interface: str
    metric: U32


@attrs.frozen(kw_only=True)
class NetworkCondition:
    """``error`` is why there is no network, where there is none; ``problems`` are what cannot be
    had of its configuration, also where there is one."""

    ready: bool
    error: str | None
    problems: tuple[str, ...]
    interfaces: tuple[Interface, ...] | None
    routes: tuple[Route, ...] | None
    resolv_conf: str | None


@attrs.frozen(kw_only=True)
class MemoryEvents:
    """How often a cgroup was held at a limit, and what came of it."""

    high: U64
    max: U64
    oom: U64
    oom_kill: U64


@attrs.frozen(kw_only=True)
class Cgroups:
    """``descendants`` are all below the root, ``dying`` those that are removed and still held."""

    controllers: tuple[str, ...]
    descendants: U64
    dying: U64
    workloads: CgroupUse | None
    workloads_memory_events: MemoryEvents | None
    agent: CgroupUse | None
    agent_memory_events: MemoryEvents | None


@attrs.frozen(kw_only=True)
class LogEntry:
    """A line of the log: a warning, an error, or a request that failed. ``ts`` is UTC."""

    ts: str
    level: str
    target: str
    message: str
    trace_id: str | None


@attrs.frozen(kw_only=True)
class AgentCondition:
    """The agent's own process; ``connections`` are those to its ports, this one among them."""

    pid: U32
    cpu_us: U64
    resident_bytes: U64
    descriptors: U32
    descriptors_limit: U64
    threads: U32
    tasks: U32
    connections: U32
    oom_score_adj: I32


@attrs.frozen(kw_only=True)
class Running:
    """How many run: commands in the VM itself, those of them in the background, and containers,
    those of them that stay."""

    commands: U32
    background: U32
    containers: U32
    standing: U32


@attrs.frozen(kw_only=True)
class Diagnosis:
    """How the VM is, capability ``diagnose-v1``; a part that cannot be told is None."""

    time: str
    took_ms: U16
    versions: Versions | None
    boot: Boot
    storage: StorageCondition
    disks: tuple[DiskDevice, ...] | None
    mounts: Mounts | None
    network: NetworkCondition
    cgroups: Cgroups | None
    pressure: Pressure | None
    oom_kills: U64 | None
    agent: AgentCondition | None
    running: Running | None
    log: tuple[LogEntry, ...]
    missing: tuple[Missing, ...]
