"""A corner of the machine's own cgroup2 hierarchy for a test."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent.processes.cgroup import Cgroup, cgroup2_mount


@asynccontextmanager
async def cgroup_corner() -> AsyncIterator[Path]:
    """A new directory of cgroup2 for the block; what still runs in it afterwards is killed.

    Skips the test where there is no cgroup2 to write to.
    """
    hierarchy = cgroup2_mount()
    if hierarchy is None:
        pytest.skip("no cgroup2 is mounted here")
    corner = Cgroup(hierarchy / f"innkeep-test-{secrets.token_hex(4)}")
    try:
        corner.path.mkdir()
    except OSError as error:
        pytest.skip(f"cgroup2 cannot be written to here: {error}")
    try:
        yield corner.path
    finally:
        corner.kill()
        with trio.CancelScope(shield=True):
            await corner.removed()
