"""What crun is told of a container, word by word."""

from pathlib import Path

import attrs

from agent.processes.accounts import User
from agent.processes.bundle import (
    DEFAULT_CAPABILITIES,
    Container,
    ContainerProcess,
    capabilities_in,
    process_config,
    runtime_config,
)
from agent.processes.command import Bind
from agent.processes.seccomp import OciProfile

PROCESS = ContainerProcess(
    argv=("sh", "-c", "true"),
    environment={"PATH": "/bin", "TOKEN": "secret"},
    directory="/srv",
    user=User(1000, 1001, (10, 1001), "/home/alice"),
    open_files=4096,
)
SECCOMP = OciProfile(
    defaultAction="SCMP_ACT_ERRNO", defaultErrnoRet=1, architectures=[], syscalls=[]
)
CONTAINER = Container(
    process=PROCESS,
    rootfs=Path("/storage/overlays/x/merged"),
    hostname="vm",
    binds=(Bind("/storage/workspace", "/workspace"), Bind("/data", "/look", read_only=True)),
    seccomp=SECCOMP,
)


def linux_of(container: Container) -> dict[str, object]:
    linux = runtime_config(container)["linux"]
    assert isinstance(linux, dict)
    return linux


def mount_at(container: Container, destination: str) -> dict[str, object]:
    mounts = runtime_config(container)["mounts"]
    assert isinstance(mounts, list)
    (mount,) = (each for each in mounts if each["destination"] == destination)
    assert isinstance(mount, dict)
    return mount


def test_the_default_capabilities_are_dockers() -> None:
    # As /proc/<pid>/status has it in any of docker's containers.
    assert sorted(capabilities_in(0xA80425FB)) == sorted(DEFAULT_CAPABILITIES)


def test_capabilities_are_told_by_the_kernels_numbers() -> None:
    assert capabilities_in(0) == []
    assert capabilities_in(1 | 1 << 21) == ["CAP_CHOWN", "CAP_SYS_ADMIN"]
    assert capabilities_in(1 << 40) == ["CAP_CHECKPOINT_RESTORE"]
    # What a newer kernel has besides is not known by name, and is not given.
    assert len(capabilities_in(2**64 - 1)) == 41


def test_a_process_is_told_all_that_was_looked_up() -> None:
    assert process_config(PROCESS) == {
        "args": ["sh", "-c", "true"],
        "env": ["PATH=/bin", "TOKEN=secret"],
        "cwd": "/srv",
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [10, 1001]},
        "capabilities": {
            kind: [*DEFAULT_CAPABILITIES] for kind in ("bounding", "effective", "permitted")
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}],
        "noNewPrivileges": False,
    }
    assert "secret" not in repr(PROCESS)
    assert "secret" not in repr(CONTAINER)


def test_a_terminal_has_its_size_from_the_start() -> None:
    config = process_config(attrs.evolve(PROCESS, terminal=True))
    assert config["terminal"] is True
    assert config["consoleSize"] == {"width": 80, "height": 24}


def test_a_container_has_namespaces_of_its_own_but_for_the_network_and_users() -> None:
    assert linux_of(CONTAINER)["namespaces"] == [
        {"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")
    ]


def test_the_kernels_command_line_is_among_the_masked_paths_of_every_container() -> None:
    for privileged in (False, True):
        masked = linux_of(attrs.evolve(CONTAINER, privileged=privileged))["maskedPaths"]
        assert isinstance(masked, list)
        assert {"/proc/cmdline", "/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(masked)


def test_only_a_whole_machine_may_change_its_cgroup_and_the_kernels_settings() -> None:
    whole = attrs.evolve(CONTAINER, privileged=True)
    assert mount_at(CONTAINER, "/sys/fs/cgroup")["options"] == ["nosuid", "noexec", "nodev", "ro"]
    assert mount_at(whole, "/sys/fs/cgroup")["options"] == ["nosuid", "noexec", "nodev", "rw"]
    assert "/proc/sys" in str(linux_of(CONTAINER)["readonlyPaths"])
    assert linux_of(whole)["readonlyPaths"] == []
    assert "devices" not in linux_of(CONTAINER)
    assert linux_of(whole)["devices"] == [
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}
    ]


def test_what_is_bound_in_comes_last_in_its_order_and_read_only_all_the_way_down() -> None:
    mounts = runtime_config(CONTAINER)["mounts"]
    assert isinstance(mounts, list)
    assert mounts[-2:] == [
        {
            "destination": "/workspace",
            "type": "bind",
            "source": "/storage/workspace",
            "options": ["rbind", "rprivate", "rw"],
        },
        {
            "destination": "/look",
            "type": "bind",
            "source": "/data",
            "options": ["rbind", "rprivate", "rro"],
        },
    ]
