"""Pulls that are cut off at any moment: what was verified stays, and the next one ends well."""

import hashlib
import os
import random
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import AgentClient, ConnectionFailed, open_client
from tests.support.chance import chance
from tests.support.counting_proxy import CountingProxy, counting_proxy
from tests.support.crash import successor
from tests.support.directory_events import on_each_event
from tests.support.execution import execute, pull, run
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.pull_targets import Target, make_target
from tests.support.rounds import rounds
from tests.support.store import (
    inventory,
    lacking_bytes,
    read_by_skopeo,
    unfinished,
    wrong_blobs,
)

# init gives an agent up that dies more often within a minute.
DEATHS_OF_ONE_MACHINE = 5
# What a pull of `fresh_image` does in the directories of the store, as `on_each_event` counts it.
MOST_EVENTS = 70
# Received by the machine's sockets, but not yet by the agent.
IN_FLIGHT_BYTES = 8 << 20


@pytest.fixture(scope="module")
def proxy(registry: LocalRegistry) -> Iterator[CountingProxy]:
    with counting_proxy(registry) as server:
        yield server


@contextmanager
def storage_directory(kind: str) -> Iterator[Path]:
    """A new directory on the machine's disk, or on a tmpfs."""
    parent = {"disk": "/var/tmp", "memory": "/dev/shm"}[kind]
    with tempfile.TemporaryDirectory(prefix="innkeep-storage-", dir=parent) as directory:
        yield Path(directory)


async def pull_until_death(machine: Machine, reference: str) -> bool:
    """Whether the agent died before it answered."""
    async with open_client(machine.address) as client:
        try:
            answer = await client.request(requests.Pull(image=reference))
        except ConnectionFailed:
            return True
        assert isinstance(answer, responses.Ok), answer
        return False


async def kill_in_mid_pull(
    machine: Machine, proxy: CountingProxy, target: Target, chances: random.Random
) -> str:
    """kill -9 the agent at a random moment of a pull, wait for its successor; the moment."""
    pid = machine.agent_pid()
    serving = successor(machine)

    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.kill(pid, signal.SIGKILL)

    proxy.settle()
    if chances.random() < 0.5:
        due = chances.randrange(target.total_bytes)
        moment = f"after {due} of {target.total_bytes} bytes"
        proxy.when_served(due, kill)
        await pull_until_death(machine, target.reference)
    else:
        event = chances.randrange(1, MOST_EVENTS)
        moment = f"at event {event} in the store"
        storage = machine.storage
        parts = ("oci", "oci/blobs/sha256", "oci/ingest", "oci/unpacked", "erofs", "layers")
        with on_each_event(
            [storage / part for part in parts], lambda count: kill() if count == event else None
        ):
            await pull_until_death(machine, target.reference)
    if not killed.is_set():
        # Too late for this pull: then what it has left is to survive.
        moment += ", which was after its end"
        kill()
    await serving()
    return moment


async def check_image(
    machine: Machine, client: AgentClient, target: Target, info: dict[str, object]
) -> None:
    """Everything of a pulled image is there and right, and nothing else is."""
    assert info["digest"] == target.image.config_digest
    assert info["layers"] == list(target.image.layers)
    for digest, name in target.contents.items():
        mounted = machine.path(f"/storage/layers/{digest.removeprefix('sha256:')}")
        noise = (mounted / "noise" / name).read_bytes()
        assert noise == hashlib.shake_128(name.encode()).digest(len(noise)), name
        assert len(noise) == random.Random(name).randrange(100 << 10, 5 << 20)
    storage = machine.path("/storage")
    assert unfinished(storage) == []
    assert wrong_blobs(storage) == []
    assert (await run(client, target.reference)).exit_code == 0


@pytest.mark.timeout(3600)
async def test_an_agent_that_is_killed_at_any_moment_of_a_pull_leaves_a_store_that_goes_on(
    registry: LocalRegistry, proxy: CountingProxy, images: Images, tmp_path: Path
) -> None:
    """What was stored is not fetched again, to the byte, and skopeo reads the store throughout."""
    chances = chance("kill")
    trials = rounds(3, 100)
    kept_bytes = 0
    for first in range(0, trials, DEATHS_OF_ONE_MACHINE):
        kind = chances.choice(["disk", "memory"])
        with (
            storage_directory(kind) as storage,
            booted(
                tmp_path / f"machine-{first}", storage=storage, insecure_registries=[proxy.address]
            ) as machine,
        ):
            pulled: list[str] = []
            for trial in range(first, min(first + DEATHS_OF_ONE_MACHINE, trials)):
                names = [f"killed-{trial}-{n}" for n in range(5)]
                target = make_target(images, proxy, f"killed-{trial}", names, chances)
                moment = await kill_in_mid_pull(machine, proxy, target, chances)
                print(f"trial {trial}, {kind}: {moment}")
                await trio.to_thread.run_sync(read_by_skopeo, storage, pulled)
                lacking = lacking_bytes(storage, target.sizes)
                sent = proxy.served.total()
                kept = target.total_bytes - sum(lacking.values())
                kept_bytes += kept
                assert kept >= sent - IN_FLIGHT_BYTES, (kept, sent)
                proxy.settle()
                async with open_client(machine.address) as client:
                    info = await pull(client, target.reference)
                    # The configuration is a blob, too, which is verified and kept at the end only.
                    assert {d: n for d, n in proxy.served.items() if d in target.sizes} == lacking
                    await check_image(machine, client, target, info)
                    assert "mkfs" not in (await execute(client, "ps")).stdout.decode()
                pulled.append(target.reference)
                await trio.to_thread.run_sync(read_by_skopeo, storage, pulled[-1:])
    assert kept_bytes > 0


async def pull_or_not(machine: Machine, target: Target, scope: trio.CancelScope) -> bool:
    """Whether a pull ended well, rather than by the agent's death or by our hanging up."""
    with scope:
        return not await pull_until_death(machine, target.reference)
    return False


@pytest.mark.timeout(3600)
async def test_two_overlapping_pulls_at_once_go_on_after_either_hung_up_or_the_agent_died(
    registry: LocalRegistry, proxy: CountingProxy, images: Images, tmp_path: Path
) -> None:
    chances = chance("two pulls")
    trials = rounds(3, 30)
    for first in range(0, trials, DEATHS_OF_ONE_MACHINE):
        with booted(tmp_path / f"{first}", insecure_registries=[proxy.address]) as machine:
            for trial in range(first, min(first + DEATHS_OF_ONE_MACHINE, trials)):
                shared = [f"shared-{trial}-{n}" for n in range(3)]
                targets = [
                    make_target(images, proxy, f"{side}-{trial}", names, chances)
                    for side, names in (
                        ("left", [*shared, f"left-{trial}"]),
                        ("right", [f"right-{trial}", *shared]),
                    )
                ]
                await cut_off_two(machine, proxy, targets, chances)
                await trio.to_thread.run_sync(
                    read_by_skopeo, machine.storage, [target.reference for target in targets]
                )


async def cut_off_two(
    machine: Machine, proxy: CountingProxy, targets: list[Target], chances: random.Random
) -> None:
    """Pull two images, end one pull or the agent in the middle, and pull both again."""
    sizes = targets[0].sizes | targets[1].sizes
    # What earlier pulls have brought does not come again.
    due = chances.randrange(sum(lacking_bytes(machine.storage, sizes).values()))
    victim = chances.choice(["left", "right", "agent"])
    print(f"{targets[0].image.tag}, {targets[1].image.tag}: {victim} ends after {due} bytes")
    scopes = [trio.CancelScope(), trio.CancelScope()]
    done = [False, False]
    token = trio.lowlevel.current_trio_token()
    pid, serving = machine.agent_pid(), successor(machine)

    def cut_off() -> None:
        if victim == "agent":
            os.kill(pid, signal.SIGKILL)
        else:
            token.run_sync_soon(scopes[victim == "right"].cancel)

    async def pull_one(side: int) -> None:
        done[side] = await pull_or_not(machine, targets[side], scopes[side])

    proxy.settle()
    proxy.when_served(due, cut_off)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull_one, 0)
        nursery.start_soon(pull_one, 1)
    if victim == "agent":
        await serving()
    else:
        assert done[victim != "right"], "the other pull failed"
    await trio.to_thread.run_sync(proxy.settle)
    lacking = lacking_bytes(machine.storage, sizes)
    infos: list[dict[str, object]] = [{}, {}]

    async def pull_again(side: int) -> None:
        async with open_client(machine.address) as client:
            infos[side] = await pull(client, targets[side].reference)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull_again, 0)
        nursery.start_soon(pull_again, 1)
    for digest, sent in proxy.served.items():
        assert digest not in sizes or sent <= lacking.get(digest, 0)
    async with open_client(machine.address) as client:
        for target, info in zip(targets, infos, strict=True):
            await check_image(machine, client, target, info)


async def test_a_disk_that_fills_up_at_any_moment_leaves_the_store_as_it_was_and_says_how_much(
    registry: LocalRegistry, proxy: CountingProxy, images: Images, tmp_path: Path
) -> None:
    """What an earlier pull has left, whole blobs and beginnings, is there as well afterwards."""
    chances = chance("full disk")
    target = make_target(images, proxy, "full", [f"full-{n}" for n in range(5)], chances)
    with booted(tmp_path, insecure_registries=[proxy.address], storage_mib=96) as machine:
        storage = machine.path("/storage")
        pid, serving = machine.agent_pid(), successor(machine)
        proxy.settle()
        proxy.when_served(target.total_bytes // 2, lambda: os.kill(pid, signal.SIGKILL))
        assert await pull_until_death(machine, target.reference)
        await serving()
        assert unfinished(storage)
        async with open_client(machine.address) as client:
            await pull(client, proxy.reference(images.busybox.reference))
            free = sorted(
                chances.randrange(target.total_bytes // 2, 5 * target.total_bytes // 2)
                for _ in range(rounds(8, 100))
            )
            missing = []
            # The first is too little for sure, and the last is enough.
            for left in [target.total_bytes // 4, *free, 4 * target.total_bytes]:
                before = inventory(storage)
                with ballast(storage, left):
                    answer = await client.request(requests.Pull(image=target.reference))
                if isinstance(answer, responses.Ok):
                    break
                print(f"{left} bytes free: {answer}")
                assert isinstance(answer, responses.Error)
                said = re.search(r"(\d+) (?:more )?bytes are (?:missing|needed)", answer.message)
                assert said, answer
                missing.append(int(said[1]))
                assert missing[-1] > 0
                assert inventory(storage) == before
            assert missing
            assert isinstance(answer, responses.Ok)
            await check_image(machine, client, target, answer.data)


@contextmanager
def ballast(storage: Path, left_bytes: int) -> Iterator[None]:
    """Fill the disk up to so many bytes for the block."""
    path = storage / "workspace/ballast"
    status = os.statvfs(storage)
    with path.open("wb") as file:
        size = status.f_bavail * status.f_frsize - left_bytes
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    try:
        yield
    finally:
        path.unlink()
