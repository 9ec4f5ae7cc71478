"""A VM that loses its power in mid-pull: the next boot finds what was verified, and goes on."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import AgentClient, ConnectionFailed, open_client
from tests.support.chance import chance
from tests.support.commands import run as run_program
from tests.support.counting_proxy import CountingProxy, counting_proxy
from tests.support.execution import pull, run, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine, booted
from tests.support.process_tree import arguments, descendants
from tests.support.pull_targets import Target, make_target
from tests.support.rounds import rounds
from tests.support.store import read_by_skopeo
from tests.support.write_log import WriteLog, copy_disk
from tests.vm.conftest import empty_disk


@pytest.fixture
def proxy(registry: LocalRegistry) -> Iterator[CountingProxy]:
    with counting_proxy(registry) as server:
        yield server


@pytest.mark.timeout(3600)
async def test_what_a_pull_had_verified_when_the_power_went_is_there_after_it(
    proxy: CountingProxy, images: Images, tmp_path: Path
) -> None:
    """Of what was written since the disk's last flush any part may be lost, and here is.

    Each boot ends the pull that the one before it could not, and is cut off in one of its own.
    """
    chances = chance("power loss")
    trials = rounds(1, 10)
    disk = empty_disk(tmp_path, 512)
    pulled: list[Target] = []
    target = None
    for boot in range(trials + 1):
        directory = tmp_path / f"boot-{boot}"
        directory.mkdir()
        log = WriteLog(directory)
        used = directory / "disk.img"
        copy_disk(disk, used)
        last = boot == trials
        with booted(
            directory,
            kind="auto",
            storage=used,
            insecure_registries=[proxy.reference(proxy.registry.address, LOOPBACK_IN_VM)],
            env=log.env,
        ) as machine:
            async with open_client(machine.address) as client:
                if target is not None:
                    await go_on(client, proxy, target)
                    pulled.append(target)
                await check_store(client, pulled)
                if last:
                    assert await client.request(requests.Shutdown()) == responses.Ok(
                        {"shutdown": True}
                    )
            if last:
                assert await trio.to_thread.run_sync(machine.wait) == 0
                break
            names = [f"power-{boot}-{n}" for n in range(4)]
            target = make_target(images, proxy, f"power-{boot}", names, chances, LOOPBACK_IN_VM)
            moment = await cut_off(machine, proxy, target, chances)
        # What this QEMU has written is forgotten, but for what a disk would have kept.
        left = log.keep_after_power_loss(disk, chances)
        print(f"trial {boot}: {moment}: {left}")
        log.path.unlink()
        used.unlink()
    dumped = tmp_path / "dumped"
    dumped.mkdir()
    run_program("debugfs", "-R", f"rdump /oci {dumped}", used)
    await trio.to_thread.run_sync(read_by_skopeo, dumped, [image.reference for image in pulled])


async def cut_off(
    machine: Machine, proxy: CountingProxy, target: Target, chances: random.Random
) -> str:
    """Kill QEMU when some bytes of a pull have been sent, often the last ones; the moment."""
    (qemu,) = (
        pid
        for pid in descendants(machine.pid)
        if any(word.endswith(b"/qemu-system-x86_64") for word in arguments(pid)[:1])
    )
    proxy.settle()
    # All but the layer that the images share, and that is fetched for the first of them only.
    new_bytes = sum(target.sizes[digest] for digest in target.contents)
    due = new_bytes if chances.random() < 0.3 else chances.randrange(new_bytes)
    killed = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def kill() -> None:
        os.kill(qemu, signal.SIGKILL)
        token.run_sync_soon(killed.set)

    proxy.when_served(due, kill)
    async with open_client(machine.address) as client:
        with pytest.raises(ConnectionFailed):
            await client.request(requests.Pull(image=target.reference))
    await killed.wait()
    return f"after {due} of {new_bytes} bytes"


async def go_on(client: AgentClient, proxy: CountingProxy, target: Target) -> None:
    """Pull again what was cut off: nothing of it comes twice."""
    found = await shell(
        client, "cd /storage/oci && stat -c '%n %s' blobs/sha256/* ingest/* 2>/dev/null || :"
    )
    sizes = {path: int(size) for path, size in map(str.split, found.splitlines())}
    lacking = {}
    for digest, size in target.sizes.items():
        name = digest.removeprefix("sha256:")
        if f"blobs/sha256/{name}" not in sizes and sizes.get(f"ingest/{name}", 0) < size:
            lacking[digest] = size - sizes.get(f"ingest/{name}", 0)
    proxy.settle()
    info = await pull(client, target.reference)
    assert info["digest"] == target.image.config_digest
    assert {d: n for d, n in proxy.served.items() if d in target.sizes} == lacking


async def check_store(client: AgentClient, pulled: list[Target]) -> None:
    """All images are there, every blob is what its name says, and containers run."""
    listed = await client.request(requests.ListImages())
    assert isinstance(listed, responses.Ok)
    assert isinstance(listed.data, list)
    assert [info["reference"] for info in listed.data] == [image.reference for image in pulled]
    sums = await shell(client, "cd /storage/oci/blobs/sha256 && sha256sum * 2>/dev/null || :")
    assert all(len(set(line.split())) == 1 for line in sums.splitlines())
    assert "EXT4-fs error" not in await shell(client, "dmesg")
    for image in pulled[-1:]:
        assert (await run(client, image.reference)).exit_code == 0
