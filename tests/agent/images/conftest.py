"""Fixtures for layers and overlays: real ones, in the tests' own mount namespace; and for pulls."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.registries import RegistrySettings
from initramfs.local_registry import LocalRegistry
from tests.agent.images.pulling import Pulling
from tests.agent.images.whole_storage import WholeStorage
from tests.support.misbehaving_registry import MisbehavingRegistry, misbehaving_registry


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    """A storage directory, in which nothing is mounted any more after the test."""
    directory = tmp_path / "storage"
    directory.mkdir()
    yield directory
    mounts = Path("/proc/self/mountinfo").read_text()
    assert [line for line in mounts.splitlines() if f" {directory}/" in line] == []


@pytest.fixture
def layers(storage: Path, mkfs_erofs: str) -> Iterator[LayerStore]:
    store = LayerStore(storage, mkfs_erofs)
    yield store
    store.unmount_all()


@pytest.fixture
def overlays(storage: Path, layers: LayerStore) -> Iterator[Overlays]:
    service = Overlays(storage, layers)
    yield service
    service.unmount_all()


@pytest.fixture
def whole(storage: Path, layers: LayerStore) -> Iterator[WholeStorage]:
    claims = LayerClaims()
    overlays = Overlays(storage, layers, claims)
    yield WholeStorage(storage, ContentStore(storage), layers, overlays, claims)
    overlays.unmount_all()


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    """A registry of one test's own, which it may have misbehave."""
    with misbehaving_registry() as registry:
        yield registry


@pytest.fixture
def pulling(tmp_path: Path, registry: LocalRegistry, server: MisbehavingRegistry) -> Pulling:
    """A store that pulls from that, and from the real registry."""
    insecure = frozenset({registry.address, server.address})
    return Pulling(tmp_path / "storage", RegistrySettings(insecure=insecure))
