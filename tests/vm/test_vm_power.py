"""VMs that are told to end, in each way that there is, in the middle of all they can do."""

import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient, ConnectionFailed, open_client
from tests.support.commands import run as run_program
from tests.support.execution import execute, pull, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, PROJECT, booted
from tests.support.qemu import Qemu
from tests.support.rounds import rounds
from tests.support.token_image import image_with_token
from tests.support.watch import until
from tests.support.workload import TOKEN, open_peer
from tests.vm.conftest import empty_disk

WRITING = """
    while :; do
        dd if=/dev/zero of="$1/new" bs=16k count=8 2>/dev/null
        mv "$1/new" "$1/written"
        mkdir -p "$1/a/b" && rm -r "$1/a"
    done
"""

End = Callable[[AgentClient, Qemu], Awaitable[None]]


async def by_request(client: AgentClient, qemu: Qemu) -> None:
    begun = time.monotonic()
    assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})
    # Hosts wait for five.
    took_s = time.monotonic() - begun
    print(f"acknowledged after {took_s:.2f} s")
    assert took_s < 5


async def by_power_button(client: AgentClient, qemu: Qemu) -> None:
    async with qemu.monitor() as monitor:
        await monitor.ask("system_powerdown")


async def by_ctrl_alt_del(client: AgentClient, qemu: Qemu) -> None:
    keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
    async with qemu.monitor() as monitor:
        await monitor.ask("send-key", keys=keys)


async def by_a_signal_to_the_agent(client: AgentClient, qemu: Qemu) -> None:
    await told_from_inside(client, "kill -TERM $(cat /sys/fs/cgroup/agent/cgroup.procs)")


async def by_poweroff(client: AgentClient, qemu: Qemu) -> None:
    await told_from_inside(client, "poweroff")


async def by_reboot(client: AgentClient, qemu: Qemu) -> None:
    await told_from_inside(client, "reboot")


async def told_from_inside(client: AgentClient, script: str) -> None:
    # The VM's end may be faster than the command's own.
    with suppress(ConnectionFailed):
        await execute(client, "sh", "-c", script)


async def by_halt(client: AgentClient, qemu: Qemu) -> None:
    await told_from_inside(client, "halt")


async def by_a_failing_power_supply(client: AgentClient, qemu: Qemu) -> None:
    await told_from_inside(client, "kill -PWR 1")


# The first ones are tried always.
ENDS: tuple[End, ...] = (
    by_power_button,
    by_poweroff,
    by_request,
    by_ctrl_alt_del,
    by_a_signal_to_the_agent,
    by_reboot,
    by_halt,
    by_a_failing_power_supply,
)


@pytest.mark.timeout(7200)
async def test_a_vm_that_is_told_to_end_under_load_leaves_its_disk_clean(
    vm_registry: str, images: Images, tmp_path: Path
) -> None:
    disk = empty_disk(tmp_path)
    for trial in range(rounds(3, 20)):
        end = ENDS[trial % len(ENDS)]
        directory = tmp_path / f"boot-{trial}"
        # An RTC that nobody has ever set, once.
        qemu = Qemu(directory, *(["-rtc", "base=2020-01-02T03:04:05"] if trial == 0 else []))
        with booted(
            directory,
            kind="auto",
            storage=disk,
            insecure_registries=[vm_registry],
            # As a VMM or a container engine says it: the kernel puts it into init's environment.
            options=["--append=INNKEEP_LOG=debug"],
            env=qemu.env,
        ) as machine:
            await until(
                lambda at=machine: "power buttons: 1" in at.console_text(), machine.console, 60
            )
            # The clock does not begin before the image was made, and nowhere else it is touched.
            assert ("by image" in machine.console_text()) == (trial == 0)
            async with (
                open_client(machine.address) as client,
                open_client(machine.address) as pulling,
            ):
                await put_under_load(client, pulling, images)
                print(f"trial {trial}: {end.__name__}")
                await end(client, qemu)
                # What it says goes into the console, and would only be in the way here.
                with trio.fail_after(60):
                    await trio.to_thread.run_sync(machine.wait, abandon_on_cancel=True)
            said_last = "restarting" if end in (by_reboot, by_ctrl_alt_del) else "powering off"
            assert f"init: {said_last}" in machine.console_text()
            assert "not having stopped everything" not in machine.console_text()
        is_clean(disk)


@pytest.mark.timeout(300)
async def test_an_agent_that_does_not_stop_is_killed_and_both_disks_left_clean_by_init(
    tmp_path: Path,
) -> None:
    storage, root = empty_disk(tmp_path, mib=64), tmp_path / "root.img"
    upper = tmp_path / "files/innkeep-root/upper"
    upper.mkdir(parents=True)
    # On its root's disk, this VM has an init that is less patient.
    init = (PROJECT / "initramfs/init").read_text()
    (upper / "init").write_text(init.replace("PATIENCE=20\n", "PATIENCE=2\n"))
    (upper / "init").chmod(0o755)
    with root.open("wb") as file:
        file.truncate(64 << 20)
    run_program("mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "files", root)
    with booted(
        tmp_path / "vm",
        kind="auto",
        storage=storage,
        options=[f"--root-disk={root}", f"--image={image_with_token(tmp_path, TOKEN)}"],
    ) as machine:
        async with open_client(machine.address) as client, open_peer(machine.address) as peer:
            # Who has the token of the initramfs is let in.
            await peer.exec(1, "true")
            assert (await peer.over(1)).exit == (0, "exited")
            assert await shell(client, "grep -c PATIENCE=2$ /init") == "1\n"
            for directory in ("/storage/workspace", "/root"):
                writing = requests.VmExec(
                    command=("sh", "-c", WRITING, "sh", directory), background=True
                )
                assert isinstance(await client.request(writing), responses.Completed)
            await shell(client, "echo kept | tee /etc/note /storage/workspace/note; sync")
            # Asleep, it does not even hear what it is told.
            asleep = "kill -STOP $(cat /sys/fs/cgroup/agent/cgroup.procs)"
            await told_from_inside(client, f"{asleep}; kill -PWR 1")
            with trio.fail_after(60):
                await trio.to_thread.run_sync(machine.wait, abandon_on_cancel=True)
        said = machine.console_text()
        assert "init: the agent ended with status 137, not having stopped everything" in said
        assert "init: powering off" in said
    for disk, note in ((storage, "workspace/note"), (root, "innkeep-root/upper/etc/note")):
        is_clean(disk)
        assert run_program("debugfs", "-R", f"cat /{note}", disk) == b"kept\n"
    # That of the initramfs is in memory, wherever the root is.
    assert TOKEN.encode() not in root.read_bytes()


def is_clean(disk: Path) -> None:
    # On the file, so that nothing is replayed or mended first.
    run_program("e2fsck", "-f", "-n", disk)
    said = run_program("dumpe2fs", "-h", disk).decode()
    assert re.search(r"^Filesystem state: +clean$", said, re.MULTILINE), said
    assert "needs_recovery" not in said


async def put_under_load(client: AgentClient, pulling: AgentClient, images: Images) -> None:
    """Have a command and a container write, and a pull go on."""
    image = images.busybox.reference_from(LOOPBACK_IN_VM)
    await pull(client, image)
    await client.request(requests.GarbageCollect(dry_run=False, purge_all=True))
    await pull(client, image)
    overlay: dict[str, Any] = {"image": image, "persistent_overlay_id": "writer"}
    write = ("sh", "-c", WRITING, "sh")
    for request in (
        requests.VmExec(command=(*write, "/storage/workspace"), background=True),
        requests.Run(command=(*write, "/root"), detached=True, **overlay),
    ):
        assert isinstance(await client.request(request), responses.Completed)
    await pulling.send(requests.Pull(image=images.large.reference_from(LOOPBACK_IN_VM)))
    assert isinstance(await pulling.receive(), responses.Progress)
