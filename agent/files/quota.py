"""Writing within the quotas of those whose files these are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent.linux.capset import CAP_SYS_RESOURCE, capget, capset


@contextmanager
def within_quotas() -> Iterator[None]:
    """Have no more room than others, in this thread and for the block.

    Whoever has CAP_SYS_RESOURCE may exceed every quota and take the blocks that a file system keeps
    back (capabilities(7)): the agent would fill a user's disk for a host where that user could not.
    """
    capabilities = capget()
    if not capabilities.effective & 1 << CAP_SYS_RESOURCE:
        yield
        return
    capabilities.effective &= ~(1 << CAP_SYS_RESOURCE)
    capset(capabilities)
    try:
        yield
    finally:
        capabilities.effective |= 1 << CAP_SYS_RESOURCE
        capset(capabilities)
