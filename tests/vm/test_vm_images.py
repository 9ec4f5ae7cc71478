"""Images in a VM, on its own disk and its kernel's EROFS: exported, flattened, and removed."""

import pytest

from protocol import decode_value, requests, responses
from protocol.client import AgentClient
from protocol.values import CollectedGarbage, StorageStatus
from tests.support.execution import pull, run, shell
from tests.support.images import Images
from tests.support.layout import digest_of
from tests.support.machine import LOOPBACK_IN_VM

pytestmark = pytest.mark.timeout(180)


async def used_bytes(client: AgentClient) -> int:
    answer = await client.ask(requests.StorageStatus(), responses.Ok)
    return decode_value(answer.data, StorageStatus).used_bytes


async def test_a_layer_is_exported_flattened_and_purged_and_its_image_pulled_again(
    vm_client: AgentClient, images: Images
) -> None:
    image = images.variant("vm-garbage", {}, images.noise_layer("vm-garbage", 8 << 20))
    reference = image.reference_from(LOOPBACK_IN_VM)
    info = await pull(vm_client, reference)

    tar = bytearray()
    async with vm_client.stream(requests.ExportLayer(info["digest"], 1)) as answers:
        async for answer in answers:
            assert isinstance(answer, responses.DataChunk), answer
            tar += answer.data
    assert digest_of(bytes(tar)) == image.diff_ids[1]

    layers = [
        f"/storage/layers/{layer.removeprefix('sha256:')}" for layer in reversed(image.layers)
    ]
    flat = "/storage/workspace/flat"
    await vm_client.ask(requests.FlattenLayers(tuple(layers), flat), responses.Ok)
    assert await shell(vm_client, f"ls {flat}/noise {flat}/bin/busybox; rm -r {flat}") == (
        f"{flat}/bin/busybox\n\n{flat}/noise:\nvm-garbage\n"
    )

    used = await used_bytes(vm_client)
    collect = requests.GarbageCollect(dry_run=False, purge_all=True)
    collected = decode_value((await vm_client.ask(collect, responses.Ok)).data, CollectedGarbage)
    assert reference in collected.images
    assert image.diff_ids[1] in collected.layers
    # A blob and an EROFS image of 8 MiB each.
    assert used - await used_bytes(vm_client) > 15 << 20
    assert layers[0] not in await shell(vm_client, "cat /proc/mounts")

    assert await pull(vm_client, reference) == info
    assert (await run(vm_client, reference, "ls", "/noise")).stdout == b"vm-garbage\n"
