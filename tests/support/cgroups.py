"""A corner of the machine's own cgroup2 hierarchy for a test."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent.processes.cgroup import Cgroup


@asynccontextmanager
async def cgroup_corner() -> AsyncIterator[Path]:
    """A new directory of cgroup2 for the block; what still runs in it afterwards is killed.

    Fails the test where there is no cgroup2 to write to.
    """
    hierarchy = cgroup2_mount()
    if hierarchy is None:
        pytest.fail("no cgroup2 is mounted here")
    corner = Cgroup(hierarchy / f"innkeep-test-{secrets.token_hex(4)}")
    try:
        corner.path.mkdir()
    except OSError as error:
        pytest.fail(f"cgroup2 cannot be written to here: {error}")
    try:
        yield corner.path
    finally:
        corner.kill()
        with trio.CancelScope(shield=True):
            await corner.removed()


def cgroup2_mount() -> Path | None:
    """Where this process has cgroup2; None if nowhere."""
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        _, where, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(where)
    return None
