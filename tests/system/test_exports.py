"""Layers of a machine's images, given away over the wire."""

from pathlib import Path

import pytest
import trio

from protocol import encode, requests, responses
from protocol.client import AgentClient, open_client
from protocol.constants import LAYER_CHUNK_SIZE
from tests.protocol.command_line import innkeep
from tests.support import trees
from tests.support.execution import pull, refusal
from tests.support.images import Images
from tests.support.layout import digest_of, gzip_layer
from tests.support.machine import Machine
from tests.support.rounds import rounds
from tests.support.wire import open_wire


async def exported(client: AgentClient, digest: str, index: int) -> bytes:
    """A layer's tar; its frames are what hosts expect."""
    tar = bytearray()
    async with client.stream(requests.ExportLayer(digest, index)) as answers:
        async for answer in answers:
            assert isinstance(answer, responses.DataChunk), answer
            assert answer.done is (answer.data == b"")
            assert len(answer.data) <= LAYER_CHUNK_SIZE
            tar += answer.data
    assert answers.complete
    return bytes(tar)


@pytest.mark.parametrize(
    "name",
    ["busybox", "zstd", "uncompressed", "docker_schema2", "whiteouts", "sparse_gnu", "odd_entries"],
)
async def test_every_layer_is_the_tar_of_its_diff_id_the_bottom_one_first(
    client: AgentClient, images: Images, name: str
) -> None:
    image = getattr(images, name)
    info = await pull(client, image.reference)
    for index, diff_id in enumerate(image.diff_ids):
        assert digest_of(await exported(client, info["digest"], index)) == diff_id
    missing = len(image.diff_ids)
    error = await refusal(client, requests.ExportLayer(info["digest"], missing))
    assert (error.code, f"the index {missing}" in error.message) == ("NOT_FOUND", True)


async def test_the_last_frame_is_empty_and_done(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    digest = (await pull(client, images.busybox.reference))["digest"]
    async with open_wire(machine.address) as wire:
        await wire.send({"method": "export_layer", "image_digest": digest, "layer_index": 0})
        frames = []
        while (frame := await wire.receive()) is not None:
            frames.append(frame)
            if frame["done"]:
                break
    assert frames[-1] == {"status": "data_chunk", "data": "", "done": True}
    assert {frame["status"] for frame in frames} == {"data_chunk"}


@pytest.mark.parametrize("digest", ["", "sha256:" + "0" * 64, "busybox", "../../etc/passwd"])
async def test_an_image_that_is_not_there_is_not_found(client: AgentClient, digest: str) -> None:
    error = await refusal(client, requests.ExportLayer(digest, 0))
    assert error.code == "NOT_FOUND"
    assert repr(digest) in error.message


async def test_a_manifests_digest_is_not_an_images(client: AgentClient, images: Images) -> None:
    await pull(client, images.busybox.reference)
    error = await refusal(client, requests.ExportLayer(images.busybox.manifest_digest, 0))
    assert error.code == "NOT_FOUND"


async def test_a_damaged_layer_ends_in_an_error_and_a_pull_mends_it(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    image = images.variant("export-damaged", {}, images.noise_layer("damaged", 3 << 20, gzip_layer))
    info = await pull(client, image.reference)
    tar = machine.storage / "erofs" / f"{image.diff_ids[1].removeprefix('sha256:')}.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    request = requests.ExportLayer(info["digest"], 1)
    error = await refusal(client, request)
    assert error.code == "EXPORT_FAILED"
    assert "the disk has damaged it" in error.message
    # The connection goes on, and so does the image.
    assert await client.request(requests.Query(image.reference)) == responses.Ok(info)
    assert await pull(client, image.reference) == info
    assert digest_of(await exported(client, info["digest"], 1)) == image.diff_ids[1]


@pytest.fixture
async def large(client: AgentClient, images: Images) -> str:
    """The digest of an image whose second layer is of 64 MiB."""
    layer = gzip_layer(trees.archive(trees.zeros))
    image = images.variant("export-large", {}, layer)
    return str((await pull(client, image.reference))["digest"])


async def test_a_host_may_hang_up_at_any_byte(
    machine: Machine, client: AgentClient, large: str
) -> None:
    frame = len(encode(responses.DataChunk(bytes(1 << 20), done=False)))
    many = rounds(quick=20, soak=1000)
    for n in range(many):
        async with open_wire(machine.address) as wire:
            await wire.send({"method": "export_layer", "image_digest": large, "layer_index": 1})
            left = n * 3 * frame // many
            while left > 0:
                left -= len(await wire.stream.receive_some(left))
    assert len(await exported(client, large, 1)) > 64 << 20


async def test_a_host_that_does_not_read_costs_neither_memory_nor_anybody_elses_time(
    machine: Machine, client: AgentClient, large: str
) -> None:
    await exported(client, large, 1)
    before = machine.agents_memory_bytes()
    async with open_wire(machine.address) as wire:
        await wire.send({"method": "export_layer", "image_digest": large, "layer_index": 1})
        assert await wire.stream.receive_some(1)
        # Others get theirs, while what this one has asked for waits.
        assert len(await exported(client, large, 1)) > 64 << 20
        assert machine.agents_memory_bytes() - before < 24 << 20


async def test_several_hosts_export_at_once(machine: Machine, large: str) -> None:
    digests = set()

    async def export() -> None:
        async with open_client(machine.address) as client:
            digests.add(digest_of(await exported(client, large, 1)))

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(export)
    assert len(digests) == 1


async def test_innkeep_writes_a_layer_to_a_file(
    machine: Machine, client: AgentClient, images: Images, tmp_path: Path
) -> None:
    image = images.busybox
    info = await pull(client, image.reference)
    target = tmp_path / "layer.tar"
    for name in (info["digest"], info["digest"][7:19], image.reference):
        arguments = ("--connect", machine.address, "export-layer", name, "0", "-o", str(target))
        result = await innkeep(*arguments)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        assert digest_of(target.read_bytes()) == image.diff_ids[0]
        target.unlink()
