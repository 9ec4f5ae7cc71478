"""Fixtures: a machine to talk to, and a client that does."""

from collections.abc import AsyncIterator, Iterator

import pytest

from initramfs.local_registry import LocalRegistry
from protocol.client import AgentClient, open_client
from tests.support.execution import pull
from tests.support.images import Images
from tests.support.machine import Machine, agent_alone, booted
from tests.support.misbehaving_registry import MisbehavingRegistry, misbehaving_registry
from tests.support.standing import Persistent, persistent_overlay
from tests.support.tools import ROOTFS, image_program


@pytest.fixture(scope="session")
def misbehaving() -> Iterator[MisbehavingRegistry]:
    """A registry that the machine may pull from too, and that can be told to misbehave."""
    with misbehaving_registry() as server:
        yield server


@pytest.fixture(scope="session")
def machine(
    registry: LocalRegistry,
    misbehaving: MisbehavingRegistry,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Machine]:
    """The image in namespaces, at native speed; it may pull from both registries. Shared."""
    directory = tmp_path_factory.mktemp("machine")
    registries = [registry.address, misbehaving.address]
    with booted(directory, insecure_registries=registries) as guest:
        yield guest


@pytest.fixture
async def client(machine: Machine) -> AsyncIterator[AgentClient]:
    """A connection to the machine's agent."""
    async with open_client(machine.address) as connection:
        yield connection


@pytest.fixture
async def persistent(
    machine: Machine, client: AgentClient, images: Images
) -> AsyncIterator[Persistent]:
    """A persistent overlay of the busybox image, for one test."""
    await pull(client, images.busybox.reference)
    async with persistent_overlay(machine, images.busybox.reference) as overlay:
        yield overlay


@pytest.fixture(scope="session")
def lone_agent(
    registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """The agent as a process of this machine; of the image it has mkfs.erofs only."""
    directory = tmp_path_factory.mktemp("agent")
    mkfs_erofs = image_program(ROOTFS.absolute(), "mkfs.erofs", directory)
    with agent_alone(
        directory,
        options=["--insecure-registry", registry.address],
        env={"INNKEEP_MKFS_EROFS": str(mkfs_erofs)},
    ) as agent:
        yield agent
