"""One VM for all tests that only talk to it; those that end theirs boot their own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from initramfs.local_registry import LocalRegistry
from protocol.client import AgentClient, open_client
from tests.support.machine import LOOPBACK_IN_VM, Machine, booted


@pytest.fixture(scope="session")
def vm_registry(registry: LocalRegistry) -> str:
    """The registry of the tests, as a VM names it."""
    return f"{LOOPBACK_IN_VM}:{registry.port}"


@pytest.fixture(scope="session")
def vm(vm_registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A VM with an empty storage disk, and the vsock loopback for a look from inside."""
    directory = tmp_path_factory.mktemp("vm")
    with booted(
        directory,
        kind="auto",
        storage=empty_disk(directory),
        insecure_registries=[vm_registry],
        options=["--append=innkeep.vsock_peers=1,2"],
    ) as machine:
        yield machine


@pytest.fixture
async def vm_client(vm: Machine) -> AsyncIterator[AgentClient]:
    async with open_client(vm.address) as client:
        yield client


def empty_disk(directory: Path, mib: int = 1024, name: str = "storage.img") -> Path:
    """A disk of nothing but zeros, which takes no space here."""
    disk = directory / name
    with disk.open("wb") as file:
        file.truncate(mib << 20)
    return disk
