"""Images of whole systems, each made by another program: their trees are umoci's in everything."""

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import AgentClient
from tests.support.debian_images import RECIPES, TAG, debian_image
from tests.support.execution import pull
from tests.support.machine import Machine
from tests.support.registry import push
from tests.support.tree import Tree, describe, differences

# The first time they are built, which takes a minute.
pytestmark = pytest.mark.timeout(600)


async def merged_tree(machine: Machine, client: AgentClient, reference: str) -> Tree:
    """What a container of an image sees, but for what it is given beside it."""
    overlay = requests.PrepareOverlay(image=reference, workload_id="fidelity")
    answer = await client.request(overlay)
    assert isinstance(answer, responses.Ok), answer
    assert isinstance(answer.data, dict)
    tree = await trio.to_thread.run_sync(describe, machine.path(answer.data["rootfs_path"]))
    removed = await client.request(requests.CleanupOverlay(workload_id="fidelity"))
    assert removed == responses.Ok()
    return tree


@pytest.mark.parametrize("name", RECIPES)
async def test_the_tree_is_what_umoci_unpacks(
    machine: Machine, client: AgentClient, registry: LocalRegistry, name: str
) -> None:
    image = await trio.to_thread.run_sync(debian_image, RECIPES[name])
    reference = await trio.to_thread.run_sync(push, registry, image.layout, TAG, f"debian-{name}")
    await pull(client, reference)
    actual = await merged_tree(machine, client, reference)
    assert differences(image.tree(), actual) == []
