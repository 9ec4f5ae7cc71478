"""Binding a directory or a file of the VM into a container that already runs."""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

from agent.errors import AgentError, cause_of, failing_as
from agent.linux.mount import (
    MNT_DETACH,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    closing,
    mount_setattr,
    move_mount,
    open_tree,
    umount2,
)
from agent.linux.namespaces import CLONE_FS, CLONE_NEWNS, setns, unshare
from agent.processes.command import Bind
from protocol.errors import ErrorCode


def bind_into(pid: int, bind: Bind, *, replaces: bool = False) -> None:
    """Make ``bind`` in the mount namespace of ``pid``; its mount point is made if missing. Blocks.

    The path is the container's: its symlinks lead nowhere but inside it. ``replaces``: what is
    mounted there is detached before.

    Raises:
        AgentError: MOUNT_FAILED with the cause.
    """
    doing = f"mount {bind.source} at {bind.destination} in the container"
    with failing_as(ErrorCode.MOUNT_FAILED, doing), closing(open_tree(bind.source)) as tree:
        attributes = MOUNT_ATTR_RDONLY if bind.read_only else 0
        mount_setattr(tree, set_attributes=attributes, propagation=MS_PRIVATE)
        with closing(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as namespace:
            failures: list[OSError] = []
            # A thread of its own, which ends: there is no way back out of the container for it.
            arguments = (namespace, tree, bind.destination, replaces, failures)
            thread = threading.Thread(target=_attach, args=arguments, daemon=True)
            thread.start()
            thread.join()
    if failures:
        raise AgentError(ErrorCode.MOUNT_FAILED, f"{doing}: {cause_of(failures[0])}")


def _attach(
    namespace: int, tree: int, destination: str, replaces: bool, failures: list[OSError]
) -> None:
    try:
        is_directory = stat.S_ISDIR(os.fstat(tree).st_mode)
        unshare(CLONE_FS)
        setns(namespace, CLONE_NEWNS)
        place = Path(destination)
        (place if is_directory else place.parent).mkdir(parents=True, exist_ok=True)
        if replaces:
            with suppress(OSError):  # nothing is mounted there any more
                umount2(os.path.realpath(place), MNT_DETACH)
        if not place.exists():
            place.touch()
        # It follows no link by itself.
        move_mount(tree, os.path.realpath(place))
    except FileExistsError:
        failures.append(NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    except OSError as error:
        failures.append(error)
