"""What the storage says of itself, and that asking for its format harms nothing."""

import os
from pathlib import Path

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import pull, run
from tests.support.images import Images
from tests.support.machine import Machine, booted


async def status(client: AgentClient) -> dict[str, int]:
    answer = await client.request(requests.StorageStatus())
    assert isinstance(answer, responses.Ok), answer
    assert isinstance(answer.data, dict)
    return answer.data


async def test_its_status_is_what_the_file_system_says(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    await pull(client, images.busybox.reference)
    found = await status(client)
    assert list(found) == ["ready", "total_bytes", "used_bytes", "layer_count", "image_count"]
    assert found["ready"] is True
    disk = os.statvfs(machine.storage)
    assert found["total_bytes"] == disk.f_blocks * disk.f_frsize
    assert 0 < found["used_bytes"] < found["total_bytes"]


async def test_its_status_counts_images_and_distinct_layers(
    client: AgentClient, images: Images
) -> None:
    await pull(client, images.busybox.reference)
    before = await status(client)
    image = images.variant("counted", {"Cmd": ["true"]}, images.noise_layer("counted"))
    await pull(client, image.reference)
    after = await status(client)
    assert after["image_count"] == before["image_count"] + 1
    assert after["layer_count"] == before["layer_count"] + 1


async def test_the_directories_that_hosts_rely_on_are_there(machine: Machine) -> None:
    for name in ("overlays", "layers", "workspace"):
        assert (machine.path("/storage") / name).is_dir()


async def test_formatting_storage_that_is_up_keeps_its_data(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    image = images.busybox.reference
    await pull(client, image)
    (machine.storage / "workspace/kept").write_text("kept")
    assert await client.request(requests.FormatStorage()) == responses.Ok()
    assert (machine.storage / "workspace/kept").read_text() == "kept"
    (machine.storage / "workspace/kept").unlink()
    assert (await run(client, image, "true")).exit_code == 0


async def test_without_a_disk_images_are_kept_in_memory(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    with booted(tmp_path, in_memory=True, insecure_registries=[registry.address]) as machine:
        async with open_client(machine.address) as client:
            await pull(client, images.whiteouts.reference)
            assert (await run(client, images.whiteouts.reference, "true")).exit_code == 0
            found = await status(client)
            assert (found["ready"], found["image_count"]) == (True, 1)
            assert 0 < found["used_bytes"] < found["total_bytes"]
