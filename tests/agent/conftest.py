"""Tests of the agent's parts mount things where nobody else sees them."""

import os

from agent.linux.mount import MS_PRIVATE, MS_REC, mount
from agent.linux.namespaces import CLONE_NEWNS, unshare
from tests.support.tools import mkfs_erofs

__all__ = ["mkfs_erofs"]


def pytest_configure() -> None:
    """Take a mount namespace before there is any thread: one would stay in the machine's."""
    if os.geteuid() == 0:
        unshare(CLONE_NEWNS)
        mount(None, "/", flags=MS_REC | MS_PRIVATE)
