"""A machine's layers, flattened into one directory."""

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.crash import kill_agent
from tests.support.execution import pull, refusal, shell
from tests.support.images import Images
from tests.support.machine import Machine
from tests.support.tree import describe, differences
from tests.support.wire import open_wire

OUTPUT = "/storage/workspace/flat"


async def flatten(client: AgentClient, *lowerdirs: str) -> None:
    answer = await client.request(requests.FlattenLayers(lowerdirs, OUTPUT))
    assert answer == responses.Ok()


async def layers_of(client: AgentClient, reference: str) -> list[str]:
    """Where an image's layers are, topmost first."""
    layers = (await pull(client, reference))["layers"]
    return [f"/storage/layers/{digest.removeprefix('sha256:')}" for digest in reversed(layers)]


@pytest.mark.parametrize("name", ["whiteouts", "odd_entries", "sixty_layers"])
async def test_an_image_flattened_is_what_umoci_unpacks(
    machine: Machine, client: AgentClient, images: Images, name: str
) -> None:
    image = getattr(images, name)
    await flatten(client, *await layers_of(client, image.reference))
    expected = await trio.to_thread.run_sync(images.tree, image)
    assert differences(expected, describe(machine.path(OUTPUT))) == []
    await shell(client, f"rm -r {OUTPUT}")


async def test_an_overlays_changes_lie_above_its_layers(
    client: AgentClient, images: Images
) -> None:
    image = images.busybox.reference
    layers = await layers_of(client, image)
    info = await client.ask(requests.PrepareOverlay(image, "flat"), responses.Ok)
    assert isinstance(info.data, dict)
    await shell(client, f"cd {info.data['rootfs_path']}; rm etc/passwd; echo x >etc/new")
    await flatten(client, "", "/nowhere", info.data["upper_path"], *layers)
    assert await shell(client, f"ls {OUTPUT}/etc") == "group\nnew\n"
    await client.ask(requests.CleanupOverlay("flat"), responses.Ok)
    await shell(client, f"rm -r {OUTPUT}")


async def test_what_fails_is_named_and_leaves_nothing(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    await shell(client, "mkdir /storage/workspace/bad; echo >/storage/workspace/bad/file")
    bad = "/storage/workspace/bad/file"
    error = await refusal(client, requests.FlattenLayers((bad,), OUTPUT))
    assert error.code == "OVERLAY_FAILED"
    assert error.message == f"flatten layers into {OUTPUT}: {bad}: Not a directory"
    assert not machine.path(OUTPUT).exists()
    error = await refusal(client, requests.FlattenLayers(("/storage/workspace/bad",), ""))
    assert error.code == "INVALID_REQUEST"
    await shell(client, "rm -r /storage/workspace/bad")


async def test_one_that_dies_with_its_agent_leaves_nothing_that_looks_whole(
    machine: Machine, images: Images
) -> None:
    async with open_client(machine.address) as client:
        layers = await layers_of(client, images.large.reference)
    async with open_wire(machine.address) as wire:
        await wire.send({"method": "flatten_layers", "lowerdirs": layers, "output": OUTPUT})
        await kill_agent(machine)
    async with open_client(machine.address) as client:
        if not machine.path(OUTPUT).exists():
            await flatten(client, *layers)
        noise = sorted((machine.path(OUTPUT) / "noise").iterdir())
        assert [path.stat().st_size for path in noise] == [12 << 20] * 4
        await shell(client, f"rm -r {OUTPUT}")
        assert await shell(client, "ls -A /storage/workspace") == ""
