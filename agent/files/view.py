"""An overlay as its container would see it, while none runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from agent.files.guest_path import GuestPath, GuestRoot, Owner, closing
from agent.linux.mount import MS_BIND, MS_PRIVATE, MS_REC, mount
from agent.linux.namespaces import CLONE_FS, CLONE_NEWNS, unshare


@contextmanager
def mounted_view(directory: Path, binds: Mapping[GuestPath, Path]) -> Iterator[GuestRoot]:
    """The tree at ``directory`` as a root, with the ``binds`` (what is to be seen where) in it.

    They are mounted where nobody else sees them, in a mount namespace that ends with the block.
    Mount points are made, as a container's start would do. Blocks; raises OSError.
    """
    opened: list[int] = []
    failures: list[OSError] = []

    def open_view() -> None:
        try:
            unshare(CLONE_FS | CLONE_NEWNS)
            mount(None, "/", flags=MS_REC | MS_PRIVATE)
            # Holds the namespace, without which what is mounted in it comes apart.
            opened.append(os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
            opened.append(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            root = GuestRoot(opened[-1])
            for destination, source in binds.items():
                mount_point, _ = root.make_directory(destination, Owner())
                with closing(mount_point):
                    mount(source, f"/proc/self/fd/{mount_point}", flags=MS_BIND)
        except OSError as error:
            failures.append(error)

    # A thread of its own, which ends: there is no way back out of the namespace for it.
    thread = threading.Thread(target=open_view, daemon=True)
    thread.start()
    thread.join()
    try:
        if failures:
            raise failures[0]
        namespace, directory_in_it = opened
        yield GuestRoot(directory_in_it, namespace)
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)
