"""Pulls where the machine's network could not be brought up."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent.channel import Channel
from agent.config import AgentConfig
from agent.connection import Connection
from agent.errors import AgentError
from agent.handlers.images import pull
from agent.services import Services, open_services
from protocol import requests, responses
from protocol.errors import ErrorCode
from tests.support.layout import gzip_layer
from tests.support.misbehaving_registry import MisbehavingRegistry, misbehaving_registry, silent
from tests.support.trees import archive, numbered
from tests.support.wire import Wire

FAILURE = AgentError(ErrorCode.INTERNAL_ERROR, "configure the network: No such device: eth0")


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        registry.add_image("latest", [gzip_layer(archive(numbered(1)))])
        yield registry


@asynccontextmanager
async def opened(
    directory: Path, mkfs_erofs: str, server: MisbehavingRegistry
) -> AsyncIterator[Services]:
    config = AgentConfig(
        listen="unix:none",
        in_image=False,
        storage_dir=directory / "storage",
        run_dir=directory / "run",
        insecure_registries=frozenset({server.address}),
        mkfs_erofs=mkfs_erofs,
    )
    for path in (config.storage_dir, config.run_dir):
        path.mkdir()
    async with open_services(config, None) as services:
        images = await services.images.passed(ErrorCode.PULL_FAILED)
        await services.network.passed(ErrorCode.PULL_FAILED)
        yield services
        images.layers.unmount_all()


async def pulled(services: Services, reference: str) -> tuple[list[str], responses.Ok]:
    """What a host is told of a pull, and its answer."""
    ours, theirs = socket.socketpair()
    async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream:
        with ours:
            channel = Channel(Connection(ours))
            answer = await pull(requests.Pull(image=reference), channel, services)
        assert isinstance(answer, responses.Ok)
        wire, told = Wire(stream), []
        while (message := await wire.receive()) is not None:
            told.append(str(message["message"]))
        return told, answer


async def test_an_image_of_the_store_is_taken_where_the_network_never_came_up(
    tmp_path: Path, mkfs_erofs: str, server: MisbehavingRegistry
) -> None:
    async with opened(tmp_path, mkfs_erofs, server) as services:
        _, first = await pulled(services, server.reference())
        services.network.fail(FAILURE)
        server.misbehave("manifests/latest", silent)
        told, second = await pulled(services, server.reference())
        assert second == first
        assert told[-1] == (
            f"{server.reference()}: no answer within 2 s; taking the image in the store"
        )


async def test_why_the_network_is_not_there_is_told_where_an_image_is_not_there_either(
    tmp_path: Path, mkfs_erofs: str, server: MisbehavingRegistry
) -> None:
    async with opened(tmp_path, mkfs_erofs, server) as services:
        services.network.fail(FAILURE)
        with pytest.raises(AgentError) as failed:
            await pulled(services, "registry.invalid/image")
    assert failed.value.code is ErrorCode.PULL_FAILED
    assert "cannot resolve registry.invalid: " in failed.value.message
    assert failed.value.message.endswith(f" ({FAILURE.message})")
