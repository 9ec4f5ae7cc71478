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
    _mount("/sys/fs/cgroup", "cgroup", "cgroup", (*_PRIVATE, "ro")),
    _mount("/dev/mqueue", "mqueue", "mqueue", _PRIVATE),
    _mount("/dev/shm", "tmpfs", "shm", (*_PRIVATE, "mode=1777", "size=67108864")),
)


@attrs.frozen(kw_only=True)
class Container:
    """All that a config.json depends on."""

    argv: Sequence[str]
    environment: Mapping[str, str] = attrs.field(repr=False)
    directory: str
    user: User
    rootfs: Path
    hostname: str
    binds: Sequence[Bind]
    seccomp: OciProfile = attrs.field(repr=False)
    open_files: int
    """RLIMIT_NOFILE."""


def runtime_config(container: Container) -> dict[str, object]:
    """The content of config.json."""
    capabilities = [*DEFAULT_CAPABILITIES]
    user = container.user
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(container.rootfs)},
        "hostname": container.hostname,
        "process": {
            "args": [*container.argv],
            "env": [f"{name}={value}" for name, value in container.environment.items()],
            "cwd": container.directory,
            "user": {
                "uid": user.uid,
                "gid": user.gid,
                "additionalGids": [*user.supplementary_gids],
            },
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [
                {
                    "type": "RLIMIT_NOFILE",
                    "soft": container.open_files,
                    "hard": container.open_files,
                }
            ],
            "noNewPrivileges": False,
        },
        "mounts": [*_MOUNTS, *map(_bind, container.binds)],
        "linux": {
            "namespaces": [{"type": kind} for kind in _NAMESPACES],
            "maskedPaths": [*_MASKED_PATHS],
            "readonlyPaths": [*_READ_ONLY_PATHS],
            "seccomp": container.seccomp,
        },
    }


def _bind(bind: Bind) -> dict[str, object]:
    mode = "ro" if bind.read_only else "rw"
    return _mount(bind.destination, "bind", bind.source, ("rbind", "rprivate", mode))


def hosts_file(of_vm: str, hostname: str) -> str:
    """/etc/hosts for a container: the VM's, whose network it has, with its name in it."""
    lines = of_vm.rstrip("\n").split("\n") if of_vm.strip() else [*_HOSTS]
    known = {name for line in lines for name in line.partition("#")[0].split()[1:]}
    if hostname not in known:
        lines.append(f"127.0.1.1\t{hostname}")
    return "".join(f"{line}\n" for line in lines)


_HOSTS: Sequence[str] = ("127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback")
