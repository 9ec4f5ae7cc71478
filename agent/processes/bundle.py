"""The OCI bundle of a container: its config.json, as docker would write it, as pure data.

https://github.com/opencontainers/runtime-spec/blob/main/config.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from agent.processes.accounts import User
from agent.processes.command import Bind
from agent.processes.seccomp import OciProfile
from agent.processes.terminal import DEFAULT_SIZE

# moby's oci/caps/defaults.go.
DEFAULT_CAPABILITIES: Sequence[str] = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)

# capabilities(7), by their numbers: what a whole-machine container has.
_ALL_CAPABILITIES: Sequence[str] = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)

# moby's oci/defaults.go, and the kernel's command line, which holds the boot's configuration.
_MASKED_PATHS: Sequence[str] = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/cmdline",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READ_ONLY_PATHS: Sequence[str] = (
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
)

_NAMESPACES: Sequence[str] = ("pid", "mount", "ipc", "uts", "cgroup")

_PRIVATE = ("nosuid", "noexec", "nodev")


def _mount(destination: str, kind: str, source: str, options: Sequence[str]) -> dict[str, object]:
    return {"destination": destination, "type": kind, "source": source, "options": [*options]}


_MOUNTS: Sequence[Mapping[str, object]] = (
    _mount("/proc", "proc", "proc", _PRIVATE),
    _mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    _mount(
        "/dev/pts",
        "devpts",
        "devpts",
        ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    ),
    _mount("/sys", "sysfs", "sysfs", (*_PRIVATE, "ro")),
    _mount("/dev/mqueue", "mqueue", "mqueue", _PRIVATE),
    _mount("/dev/shm", "tmpfs", "shm", (*_PRIVATE, "mode=1777", "size=67108864")),
)


# The agent's own init in a container that outlives its commands. Not in the container's root: what
# an overlay's upper directory holds is the workload's alone.
INIT_PATH = "/dev/.innkeep-init"


@attrs.frozen(kw_only=True)
class ContainerProcess:
    """A command in a container, with everything looked up that it depends on."""

    argv: Sequence[str]
    environment: Mapping[str, str] = attrs.field(repr=False)
    directory: str
    user: User
    open_files: int
    """RLIMIT_NOFILE."""
    terminal: bool = False
    capabilities: Sequence[str] = DEFAULT_CAPABILITIES


@attrs.frozen(kw_only=True)
class Container:
    """All that a config.json depends on."""

    process: ContainerProcess
    rootfs: Path
    hostname: str
    binds: Sequence[Bind]
    seccomp: OciProfile = attrs.field(repr=False)
    privileged: bool = False
    """A machine of its own: it may change its cgroup and the kernel's settings, and has FUSE."""


def capabilities_in(mask: int) -> Sequence[str]:
    """The names of those whose bits are set, as /proc/<pid>/status has them (CapBnd)."""
    return [name for number, name in enumerate(_ALL_CAPABILITIES) if mask >> number & 1]


def process_config(process: ContainerProcess) -> dict[str, object]:
    """The ``process`` of a config.json, and the content of a process.json."""
    capabilities = [*process.capabilities]
    config: dict[str, object] = {
        "args": [*process.argv],
        "env": [f"{name}={value}" for name, value in process.environment.items()],
        "cwd": process.directory,
        "user": {
            "uid": process.user.uid,
            "gid": process.user.gid,
            "additionalGids": [*process.user.supplementary_gids],
        },
        "capabilities": {
            "bounding": capabilities,
            "effective": capabilities,
            "permitted": capabilities,
        },
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": process.open_files, "hard": process.open_files}
        ],
        "noNewPrivileges": False,
    }
    if process.terminal:
        # From its first moment: whoever takes the terminal over comes too late to say it.
        size = {"width": DEFAULT_SIZE.columns, "height": DEFAULT_SIZE.rows}
        config |= {"terminal": True, "consoleSize": size}
    return config


def runtime_config(container: Container) -> dict[str, object]:
    """The content of config.json."""
    cgroup_mode = "rw" if container.privileged else "ro"
    cgroup = _mount("/sys/fs/cgroup", "cgroup", "cgroup", (*_PRIVATE, cgroup_mode))
    linux: dict[str, object] = {
        "namespaces": [{"type": kind} for kind in _NAMESPACES],
        "maskedPaths": [*_MASKED_PATHS],
        "readonlyPaths": [] if container.privileged else [*_READ_ONLY_PATHS],
        "seccomp": container.seccomp,
    }
    if container.privileged:
        linux["devices"] = [
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}
        ]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(container.rootfs)},
        "hostname": container.hostname,
        "process": process_config(container.process),
        "mounts": [*_MOUNTS, cgroup, *map(_bind, container.binds)],
        "linux": linux,
    }


def _bind(bind: Bind) -> dict[str, object]:
    mode = "rw"
    if bind.read_only:
        # With all that is mounted below it. What crun changes like that has to be a directory.
        mode = "ro" if bind.destination == INIT_PATH else "rro"
    return _mount(bind.destination, "bind", bind.source, ("rbind", "rprivate", mode))
