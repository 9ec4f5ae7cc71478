"""The end of a VM one of whose shares does not answer any more: its virtiofsd is dead."""

import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from protocol import requests, responses
from protocol.client import ConnectionFailed, open_client
from tests.support.commands import run as run_program
from tests.support.execution import execute, shell
from tests.support.machine import Machine, booted
from tests.support.process_tree import arguments, descendants
from tests.vm.conftest import empty_disk

pytestmark = pytest.mark.timeout(300)

# A share has what is written to it at once, but not what is changed in memory.
DIRTY = """
import mmap, signal
with open("/share/file", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    memory[:] = b"x" * len(memory)
    print("dirty", flush=True)
    signal.pause()
"""


# There is no event for that; fs/fuse/dev.c has the name.
UNTIL_STUCK = """
agent=$(cat /sys/fs/cgroup/agent/cgroup.procs)
until grep -q request_wait_answer /proc/$agent/task/*/wchan; do :; done
"""


async def by_request(machine: Machine) -> None:
    """The agent is stuck itself, having been asked for a file of the share."""
    async with open_client(machine.address) as stuck, open_client(machine.address) as client:
        await stuck.send(requests.FileRead("/share/file"))
        await execute(client, "sh", "-c", UNTIL_STUCK)
        assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})


async def by_init_alone(machine: Machine) -> None:
    """The agent dies before it has stopped anything."""
    agent = "agent=$(cat /sys/fs/cgroup/agent/cgroup.procs)"
    script = f"{agent}; kill -STOP $agent; kill -USR2 1; kill -KILL $agent"
    async with open_client(machine.address) as client:
        with suppress(ConnectionFailed):
            await execute(client, "sh", "-c", script)


@pytest.mark.parametrize("end", [by_request, by_init_alone])
async def test_a_vm_with_a_dead_share_ends_and_leaves_its_disks_clean(
    tmp_path: Path, end: Callable[[Machine], Awaitable[None]]
) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_bytes(bytes(1 << 20))
    disks = [empty_disk(tmp_path, name=name, mib=256) for name in ("storage.img", "root.img")]
    with booted(
        tmp_path / "vm",
        kind="auto",
        storage=disks[0],
        options=[f"--root-disk={disks[1]}", f"--share=code={share}"],
    ) as machine:
        async with open_client(machine.address) as client:
            await shell(client, "echo kept >/kept; echo kept >/storage/workspace/kept")
            await shell(client, "mkdir /share; mount -t virtiofs code /share")
            command = ("python3", "-I", "-S", "-c", DIRTY)
            await client.send(requests.VmExec(command=command, interactive=True))
            assert isinstance(await client.receive(), responses.Started)
            assert await client.receive() == responses.Stdout(b"dirty\n")
            kill_virtiofsd(machine)
            with trio.fail_after(60):
                await end(machine)
                await trio.to_thread.run_sync(machine.wait, abandon_on_cancel=True)
        assert "powering off" in machine.console_text()
        assert "internal error" not in machine.console_text()
    for disk in disks:
        run_program("e2fsck", "-f", "-n", disk)
        assert "needs_recovery" not in run_program("dumpe2fs", "-h", disk).decode()


def kill_virtiofsd(machine: Machine) -> None:
    # QEMU's own one has a child.
    daemons = [
        child
        for child in descendants(machine.pid)
        if any(b"virtiofsd" in word for word in arguments(child)[:1])
    ]
    assert daemons
    for daemon in daemons:
        os.kill(daemon, signal.SIGKILL)
