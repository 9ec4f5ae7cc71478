"""Fixtures for commands: real ones, each in a cgroup of its own."""

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.processes.container import ContainerRuntime
from agent.processes.service import Processes, open_processes
from tests.support.cgroups import cgroup_corner
from tests.support.commands import find_program


@pytest.fixture
async def cgroup_root() -> AsyncIterator[Path]:
    """A directory of cgroup2, for an agent to have its commands' cgroups in."""
    async with cgroup_corner() as path:
        yield path


@pytest.fixture
async def processes(cgroup_root: Path, tmp_path: Path) -> AsyncIterator[Processes]:
    """The service, which starts commands in cgroups."""
    async with open_processes(cgroup_root, tmp_path / "logs") as service:
        assert service.tree is not None
        yield service


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A busybox userland, for one container at a time."""
    root = tmp_path / "rootfs"
    for directory in ("bin", "etc", "tmp", "proc", "dev", "sys"):
        (root / directory).mkdir(parents=True)
    shutil.copy(find_program("busybox"), root / "bin" / "busybox")
    for applet in subprocess.run(
        ["busybox", "--list"], stdout=subprocess.PIPE, check=True, text=True
    ).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc" / "passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001:Alice:/home/alice:/bin/sh\n"
    )
    (root / "etc" / "group").write_text(
        "root:x:0:root\nalice:x:1001:\nwheel:x:10:root,alice\naudio:x:29:alice\n"
    )
    return root


@pytest.fixture
def runtime(processes: Processes, tmp_path: Path) -> ContainerRuntime:
    """crun as it is in the image: alone with cgroup2, which takes a mount namespace here."""
    crun = tmp_path / "crun"
    crun.write_text(
        "#!/bin/sh\n"
        f"exec {find_program('unshare')} --mount --propagation private /bin/sh -c"
        " 'mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"'"
        f' sh {find_program("crun")} "$@"\n'
    )
    crun.chmod(0o755)
    return ContainerRuntime.open(processes, tmp_path / "run", crun=str(crun))
