"""A program whose root is a directory that need not hold it: nothing leads out of that directory.

The new root is a copy of the directory's mount, attached nowhere: its root is the directory itself,
so that neither `..` nor a symbolic link nor a rename leads out, and the kernel drops it with the
last process in it. On that copy nothing is executed and no device is opened, whatever lies there.
The program and its libraries come from a read-only copy of /usr, which is its working directory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from agent.linux.identity import assume
from agent.linux.mount import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    closing,
    mount_setattr,
    open_tree,
)
from agent.linux.namespaces import CLONE_FS, CLONE_NEWNS, setns, unshare
from agent.linux.spawn import HAS_SETCGROUP, spawn_from_here

_USR = "/usr"


def spawn_confined(
    program: str,
    loader: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    root: int,
    namespace: int | None = None,
    read_only: bool = False,
    with_mounts: bool = True,
    uid: int = 0,
    gid: int = 0,
    capabilities: Iterable[int] = (),
    stdio: tuple[int, int, int],
    cgroup: Path | None = None,
) -> int:
    """Start ``program`` with the directory ``root`` as its root; its pid, which the caller reaps.

    ``program`` and its ``loader`` (ld.so(8), beside which its libraries lie) are below /usr.
    ``root`` is a descriptor, O_PATH is enough, and ``namespace`` one of the mount namespace that it
    is from, where that is not ours. ``read_only``: it can change nothing there. ``with_mounts``:
    what is mounted below is there as well. All else is as for ``posix_spawn``.

    Raises:
        OSError: EPERM for who is not root; what clone or exec said.
    """
    pids: list[int] = []
    failures: list[BaseException] = []

    def start() -> None:
        try:
            where = None
            if cgroup is not None and HAS_SETCGROUP:
                where = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _enter(root, namespace, read_only=read_only, with_mounts=with_mounts)
                assume(uid, gid, capabilities)
                words = _loaded_by(loader, program, argv)
                pids.append(
                    spawn_from_here(words[0], words, env, cwd=".", stdio=stdio, cgroup=where)
                )
            finally:
                if where is not None:
                    os.close(where)
        except BaseException as error:  # noqa: BLE001 raised again by who waits
            failures.append(error)

    # A thread of its own, which ends: there is no way back out of there for it.
    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    if cgroup is not None and not HAS_SETCGROUP:
        (cgroup / "cgroup.procs").write_text(str(pids[0]), encoding="ascii")
    return pids[0]


def _enter(root: int, namespace: int | None, *, read_only: bool, with_mounts: bool) -> None:
    """Make the directory the calling thread's root, and a copy of /usr its working directory."""
    unshare(CLONE_FS)
    with closing(open_tree(_USR, recursive=False)) as usr:
        mount_setattr(usr, set_attributes=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
        if namespace is not None:
            setns(namespace, CLONE_NEWNS)
        with closing(open_tree(root, recursive=with_mounts)) as tree:
            attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
            if read_only:
                attributes |= MOUNT_ATTR_RDONLY
            mount_setattr(tree, set_attributes=attributes, propagation=MS_PRIVATE)
            os.fchdir(tree)
            os.chroot(".")
            os.fchdir(usr)


def _loaded_by(loader: str, program: str, argv: Sequence[str]) -> list[str]:
    """The words that have the loader, in /usr, load ``program`` without a look at its root."""
    libraries = _within_usr(str(Path(loader).parent))
    options = ["--argv0", argv[0], "--inhibit-cache", "--library-path", libraries]
    return [_within_usr(loader), *options, _within_usr(program), *argv[1:]]


def _within_usr(path: str) -> str:
    return str(Path(path).relative_to(_USR))
