"""Fixtures for system calls."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.cgroups import cgroup_corner


@pytest.fixture
async def cgroup() -> AsyncIterator[Path]:
    """A cgroup to put processes into."""
    async with cgroup_corner() as path:
        yield path
