"""A place to write files to, on every file system that a VM or a container may have."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.files.guest_path import GuestRoot
from agent.files.journal import Journal
from agent.files.temporary import Site
from agent.linux.mount import mount, umount2


@pytest.fixture(params=["disk", "tmpfs", "overlay"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The root's directory, on the disk, in memory, or on an overlay of it."""
    root = tmp_path / "root"
    for name in ("root", "lower", "upper", "work"):
        (tmp_path / name).mkdir()
    if request.param == "disk":
        yield root
        return
    if request.param == "tmpfs":
        mount("tmpfs", root, fstype="tmpfs")
    else:
        layers = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
        mount("overlay", root, fstype="overlay", data=layers)
    yield root
    # Busy, where a test has left something open.
    umount2(root)


@pytest.fixture
def site(directory: Path, tmp_path: Path) -> Iterator[Site]:
    """The same with a journal of its own."""
    with GuestRoot.opened(directory) as root:
        yield Site(root, None, Journal(tmp_path / "journal"))


@pytest.fixture
def notes(site: Site, tmp_path: Path) -> Path:
    """The journal's directory."""
    return tmp_path / "journal"
