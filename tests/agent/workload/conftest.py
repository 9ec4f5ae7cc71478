"""Fixtures for the workload protocol: real sockets, processes and cgroups, in this process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.cgroups import cgroup_corner
from tests.support.workload import Peer, Served, open_peer, served


@pytest.fixture
async def cgroup_root() -> AsyncIterator[Path]:
    """A directory of cgroup2, for an agent to have its commands' cgroups in."""
    async with cgroup_corner() as path:
        yield path


@pytest.fixture
async def ports(tmp_path: Path, cgroup_root: Path) -> AsyncIterator[Served]:
    """The two ports, with commands running on this machine."""
    async with served(tmp_path, cgroup_root) as service:
        yield service


@pytest.fixture
async def peer(ports: Served) -> AsyncIterator[Peer]:
    async with open_peer(ports.address) as connection:
        yield connection
