"""Outside the image: keeping our mounts and our cgroups to ourselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.errors import cause_of
from agent.linux.mount import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC, mount
from agent.linux.namespaces import CLONE_NEWNS, unshare
from agent.processes.cgroup import Cgroup

log = logging.getLogger(__name__)


@contextmanager
def isolated(cgroup_mount: Path) -> Iterator[Path | None]:
    """A mount namespace of our own, and in it a cgroup of our own; yields the cgroup's directory.

    To be entered before the process has threads. What the agent mounts is seen by nobody else on
    the machine and is gone with it. cgroup2 is mounted at ``cgroup_mount``, over whatever hierarchy
    the machine has there, since crun accepts it only alone. The cgroup is removed at the end,
    unless processes that commands left behind still live in it.

    Without the privilege the agent serves all the same, yields None, and mounting is refused when
    it is asked for.
    """
    if os.geteuid() != 0:
        log.warning("not root: images cannot be mounted, nor containers run")
        yield None
        return
    try:
        unshare(CLONE_NEWNS)
        mount(None, "/", flags=MS_REC | MS_PRIVATE)
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        mount("cgroup2", cgroup_mount, fstype="cgroup2", flags=flags)
        cgroup = Cgroup.make(cgroup_mount / _own_cgroup().lstrip("/"))
    except OSError as error:
        log.warning("commands have no cgroups of their own: %s", cause_of(error))
        yield None
        return
    try:
        yield cgroup.path
    finally:
        cgroup.remove()


def _own_cgroup() -> str:
    """Where this process is in cgroup2, as cgroups(7) has it: the line of hierarchy 0."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
