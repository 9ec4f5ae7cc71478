"""VMs that end: powered off when told to, their disk as it was when the next one boots."""

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from protocol import requests, responses
from protocol.client import open_client
from tests.support.commands import CommandError
from tests.support.commands import run as run_program
from tests.support.execution import pull, run, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, PROJECT, booted
from tests.support.process_tree import descendants, is_running
from tests.vm.conftest import empty_disk

pytestmark = pytest.mark.timeout(180)


async def test_a_vm_powers_off_and_the_next_one_finds_its_disk(
    vm_registry: str, images: Images, tmp_path: Path
) -> None:
    disk = empty_disk(tmp_path)
    image = images.busybox.reference_from(LOOPBACK_IN_VM)
    overlay = requests.PrepareOverlay(image=image, workload_id="kept")
    with booted(
        tmp_path / "first", kind="auto", storage=disk, insecure_registries=[vm_registry]
    ) as machine:
        async with open_client(machine.address) as client:
            info = await pull(client, image)
            prepared = await client.request(overlay)
            await shell(client, "echo kept >/storage/overlays/kept/merged/note")
            assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})
            # From the answer on, a host may cut the power.
            said = run_program("dumpe2fs", "-h", disk).decode()
            assert "needs_recovery" not in said
        assert await trio.to_thread.run_sync(machine.wait) == 0
        assert "powering off" in machine.console_text()
    processes = set()
    with booted(tmp_path / "second", kind="auto", storage=disk) as machine:
        processes |= set(descendants(machine.pid))
        async with open_client(machine.address) as client:
            assert await client.request(requests.Query(image=image)) == responses.Ok(info)
            assert await client.request(overlay) == prepared
            assert await shell(client, "cat /storage/overlays/kept/merged/note") == "kept\n"
            assert (await run(client, image)).stdout == b"hello from busybox\n"
            # Unmounted in good order: the journal had nothing to replay.
            assert "recovery" not in await shell(client, "dmesg | grep EXT4-fs || :")
    assert len(processes) >= 1
    assert [pid for pid in processes if is_running(pid)] == []


async def test_a_first_boot_without_a_disk_is_ready_and_keeps_images_in_memory(
    vm_registry: str, images: Images, tmp_path: Path
) -> None:
    # Nothing is cached yet: what boot.py fetches for itself must not get in before `ready`.
    new = tmp_path / "image"
    new.mkdir()
    for name in ("vmlinux", "initramfs.cpio", "manifest.json"):
        (new / name).symlink_to(PROJECT / "build" / name)
    image = images.whiteouts.reference_from(LOOPBACK_IN_VM)
    with booted(
        tmp_path,
        kind="auto",
        in_memory=True,
        insecure_registries=[vm_registry],
        options=[f"--image={new}"],
    ) as machine:
        async with open_client(machine.address) as client:
            await pull(client, image)
            assert (await run(client, image)).stdout == b"-early\nfour\nthree\n"


def test_another_program_in_the_place_of_init_is_a_way_in_when_nothing_else_works(
    tmp_path: Path,
) -> None:
    # Its words follow two dashes, as the kernel has it. When PID 1 ends, so does the VM.
    words = ("init=/bin/echo", "-- in-here")
    options = [f"--append={word}" for word in words]
    with (
        pytest.raises(CommandError),
        booted(tmp_path, kind="auto", in_memory=True, options=options),
    ):
        pass
    assert "in-here" in (tmp_path / "console.log").read_text(errors="replace").splitlines()


def test_the_demo_shows_a_container_in_a_microvm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "initramfs.demo"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Hello from a container\n" in done.stdout
    assert "Linux 6.12" in done.stdout
