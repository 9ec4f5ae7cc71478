"""Which devices containers may use, as the kernel enforces it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.processes.collect import collect
from agent.processes.command import Command
from agent.processes.process import Stdio
from agent.processes.service import Processes


async def printed_by(processes: Processes, script: str, parent: Path) -> str:
    """What a shell script in a cgroup below ``parent`` prints."""
    command = Command.from_request(("sh", "-c", script))
    async with processes.running(command, Stdio(), parent=parent) as process:
        return (await collect(process)).stdout.decode()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A node of a block device's that is not there (42 is for examples); the filter comes first."""
    node = tmp_path / "disk"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(42, 0))
    yield node
    node.unlink()


async def test_containers_have_dockers_devices_and_no_disk(
    processes: Processes, disk: Path
) -> None:
    assert processes.tree is not None
    opened = "for d in null zero full random urandom ptmx; do : </dev/$d && echo $d; done"
    assert await printed_by(processes, opened, processes.tree.containers) == (
        "null\nzero\nfull\nrandom\nurandom\nptmx\n"
    )
    attempt = f"(: <{disk}) 2>&1; (: >/dev/kmsg) 2>&1; (: </dev/kmsg) 2>&1"
    refused = (await printed_by(processes, attempt, processes.tree.containers)).splitlines()
    assert len(refused) == 3
    assert all("Operation not permitted" in line for line in refused)


async def test_containers_can_make_nodes_that_they_cannot_use(
    processes: Processes, tmp_path: Path
) -> None:
    assert processes.tree is not None
    script = (
        f"cd {tmp_path}; mknod b b 42 0 && mknod c c 1 11 && echo made; (: <b) 2>&1; (: <c) 2>&1"
    )
    made, *refused = (await printed_by(processes, script, processes.tree.containers)).splitlines()
    assert made == "made"
    assert len(refused) == 2
    assert all("Operation not permitted" in line for line in refused)


async def test_commands_in_the_vm_have_every_device(processes: Processes, disk: Path) -> None:
    assert processes.tree is not None
    script = f"(: <{disk}) 2>&1; : </dev/kmsg && echo kmsg"
    first, second = (await printed_by(processes, script, processes.tree.commands)).splitlines()
    assert "No such device" in first
    assert second == "kmsg"
