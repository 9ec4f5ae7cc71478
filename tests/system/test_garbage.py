"""Collecting garbage in a whole machine: against pulls, overlays, containers, and its own death."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol import decode_value, requests, responses
from protocol.client import AgentClient, open_client
from protocol.values import CollectedGarbage
from tests.support.crash import kill_agent
from tests.support.execution import execute, pull, refusal, run, shell
from tests.support.images import Images
from tests.support.layout import digest_of
from tests.support.machine import Machine, booted
from tests.support.misbehaving_registry import MisbehavingRegistry
from tests.support.rounds import rounds
from tests.support.standing import persistent_overlay
from tests.support.store import wrong_blobs


@pytest.fixture(scope="module")
def machine(
    registry: LocalRegistry,
    misbehaving: MisbehavingRegistry,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Machine]:
    """One of its own: others do not expect their images to go."""
    registries = [registry.address, misbehaving.address]
    with booted(tmp_path_factory.mktemp("gc"), insecure_registries=registries) as guest:
        yield guest


@pytest.fixture
async def client(machine: Machine) -> AsyncIterator[AgentClient]:
    async with open_client(machine.address) as connection:
        yield connection
        await collect(connection, purge_all=True)
        assert stored(machine) == set()


async def collect(
    client: AgentClient, *, dry_run: bool = False, purge_all: bool = False
) -> CollectedGarbage:
    request = requests.GarbageCollect(dry_run=dry_run, purge_all=purge_all)
    return decode_value((await client.ask(request, responses.Ok)).data, CollectedGarbage)


async def prepare(client: AgentClient, image: str, workload_id: str) -> dict[str, str]:
    answer = await client.ask(requests.PrepareOverlay(image, workload_id), responses.Ok)
    assert isinstance(answer.data, dict)
    return answer.data


async def clean_up(client: AgentClient, workload_id: str) -> None:
    await client.ask(requests.CleanupOverlay(workload_id), responses.Ok)


def stored(machine: Machine) -> set[str]:
    """What a collection may remove, as far as it is there."""
    places = ("oci/blobs/sha256", "oci/unpacked", "oci/ingest", "erofs", "layers")
    return {
        f"{place}/{path.name}" for place in places for path in (machine.storage / place).iterdir()
    }


async def test_the_answer_has_the_form_that_hosts_know(client: AgentClient, images: Images) -> None:
    await pull(client, images.busybox.reference)
    for dry_run in (True, False):
        answer = await client.ask(requests.GarbageCollect(dry_run=dry_run), responses.Ok)
        assert isinstance(answer.data, dict)
        assert answer.data["dry_run"] is dry_run
        assert answer.data["freed_bytes"] == 0


async def test_a_tag_that_moved_leaves_garbage_that_is_counted_and_then_removed(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    old = images.variant("gc-tag", {"Cmd": ["true"]}, images.noise_layer("gc-old"))
    await pull(client, old.reference)
    new = images.variant("gc-tag", {"Cmd": ["true"]}, images.noise_layer("gc-new"))
    await pull(client, new.reference)
    before = stored(machine)
    counted = await collect(client, dry_run=True)
    assert stored(machine) == before
    assert counted.layers == (old.diff_ids[-1],)
    assert {old.layers[-1], old.config_digest, old.manifest_digest} == set(counted.blobs)
    # The layer's blob and its EROFS image, of 1 MiB each.
    assert counted.freed_bytes > 2 << 20
    freed = await collect(client)
    assert (freed.freed_bytes, freed.layers) == (counted.freed_bytes, counted.layers)
    assert stored(machine) < before
    mounts = await shell(client, "cat /proc/self/mountinfo")
    assert old.layers[-1].removeprefix("sha256:") not in mounts
    assert new.layers[-1].removeprefix("sha256:") in mounts
    assert (await run(client, new.reference, "ls", "/noise")).stdout == b"gc-new\n"


async def test_after_a_purge_pulls_work_as_before(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    names = ("busybox", "zstd", "docker_schema2", "whiteouts")
    references = [getattr(images, name).reference for name in names]
    infos = [await pull(client, reference) for reference in references]
    purged = await collect(client, purge_all=True)
    assert sorted(purged.images) == sorted(references)
    assert stored(machine) == set()
    assert (await client.ask(requests.ListImages(), responses.Ok)).data == []
    assert (await refusal(client, requests.Query(references[0]))).code == "NOT_FOUND"
    assert (await refusal(client, requests.Run(references[0], ("true",)))).code == "NOT_FOUND"
    assert [await pull(client, reference) for reference in references] == infos
    assert wrong_blobs(machine.storage) == []
    assert (await run(client, references[0])).stdout == b"hello from busybox\n"
    assert (await run(client, references[3])).exit_code == 0


async def test_an_overlay_outlives_a_purge_mounted_or_not(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    image = images.whiteouts.reference
    await pull(client, image)
    info = await prepare(client, image, "kept")
    await shell(client, f"echo mine >{info['rootfs_path']}/mine")
    assert (await collect(client, purge_all=True)).layers == ()
    assert await shell(client, f"ls {info['rootfs_path']}/opaque")
    await execute(client, "/bin/umount", info["rootfs_path"])
    assert (await collect(client, purge_all=True)).layers == ()
    # Its image is forgotten, and not needed.
    assert await prepare(client, image, "kept") == info
    assert await shell(client, f"cat {info['rootfs_path']}/mine") == "mine\n"
    assert await shell(client, f"cat {info['rootfs_path']}/back-again") == "second\n"
    await clean_up(client, "kept")
    assert set((await collect(client)).layers) == set(images.whiteouts.diff_ids)


async def test_a_container_that_runs_keeps_its_layers(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    image = images.busybox
    await pull(client, image.reference)
    script = "echo up; read line; /bin/ls /bin | wc -l"
    command = requests.Run(image.reference, ("/bin/sh", "-c", script), interactive=True)
    async with open_client(machine.address) as other, other.stream(command) as answers:
        assert await anext(answers) == responses.Started()
        assert await anext(answers) == responses.Stdout(b"up\n")
        purged = await collect(client, purge_all=True)
        assert (purged.images, purged.layers) == ((image.reference,), ())
        await other.send(requests.Stdin(b"go\n"))
        said = await anext(answers)
        assert isinstance(said, responses.Stdout)
        assert int(said.data) > 100
        assert (await anext(answers)) == responses.Exited(0)
    assert (await collect(client)).layers == image.diff_ids


async def test_a_container_that_stays_keeps_its_layers(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    image = images.busybox.reference
    await pull(client, image)
    async with persistent_overlay(machine, image) as persistent:
        await persistent.detach("sleep 1000")
        assert (await collect(client, purge_all=True)).layers == ()
        # `run` wants the image, whose layers are still here.
        await pull(client, image)
        assert await persistent.shell("ls /bin/busybox") == "/bin/busybox\n"


async def test_an_export_that_is_under_way_keeps_its_layer(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    image = images.large
    digest = (await pull(client, image.reference))["digest"]
    tar = bytearray()
    async with (
        open_client(machine.address) as other,
        other.stream(requests.ExportLayer(digest, 1)) as answers,
    ):
        async for answer in answers:
            assert isinstance(answer, responses.DataChunk), answer
            if not tar:
                purged = await collect(client, purge_all=True)
                assert set(purged.layers) == {*image.diff_ids} - {image.diff_ids[1]}
            tar += answer.data
    assert digest_of(bytes(tar)) == image.diff_ids[1]
    assert (await collect(client)).layers == (image.diff_ids[1],)


async def test_pulls_and_purges_at_once_do_each_other_no_harm(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    references = [images.sixty_layers.reference, images.zstd.reference]
    done = trio.Event()

    async def purge() -> None:
        async with open_client(machine.address) as mine:
            while not done.is_set():
                await collect(mine, purge_all=True)

    async def pull_all() -> None:
        async with open_client(machine.address) as mine:
            for reference in references:
                await pull(mine, reference)

    for _ in range(rounds(quick=2, soak=50)):
        done = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(purge)
            nursery.start_soon(purge)
            async with trio.open_nursery() as pulls:
                for _ in range(3):
                    pulls.start_soon(pull_all)
            done.set()
    assert wrong_blobs(machine.storage) == []
    for reference in references:
        await pull(client, reference)
        assert (await run(client, reference)).exit_code == 0


async def test_a_collection_that_dies_with_its_agent_leaves_a_store_that_works(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.sixty_layers.reference
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        for _ in range(rounds(quick=2, soak=4)):
            async with open_client(machine.address) as client:
                await pull(client, image)
                await client.send(requests.GarbageCollect(dry_run=False, purge_all=True))
                await kill_agent(machine)
            async with open_client(machine.address) as client:
                assert isinstance(await client.request(requests.ListImages()), responses.Ok)
                assert (await pull(client, image))["layer_count"] == 60
                assert wrong_blobs(machine.storage) == []
                assert (await run(client, image)).stdout == b"59\n"
        async with open_client(machine.address) as client:
            await collect(client, purge_all=True)
            assert stored(machine) == set()
