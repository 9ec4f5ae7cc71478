"""Fixtures for layers and overlays: real ones, in the tests' own mount namespace."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from tests.agent.images.whole_storage import WholeStorage


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
