"""vhost-device-vsock: a VM's vsock on machines without /dev/vhost-vsock.

The host reaches the guest by a unix socket, as with Firecracker and Cloud Hypervisor: it writes
`CONNECT port\\n` and reads `OK …\\n`. What the guest connects to on port N arrives at that socket's
path with `_N` behind it.
"""

import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from initramfs import debian
from initramfs.architecture import Architecture
from initramfs.child import started
from initramfs.lock import read_lock
from initramfs.mirror import machine_mirror
from initramfs.sockets import claimed, connected

NAME = "vhost-device-vsock"
_PATIENCE_S = 10


def find_vsock_daemon(architecture: Architecture, cache: Path) -> str:
    """The program: this machine's own, or the locked version from Debian sid, kept in `cache`.

    Raises:
        BuildError: it cannot be had.
    """
    found = shutil.which(NAME)
    if found is not None:
        return found
    (package,) = read_lock(architecture.name)["sid"]
    home = cache / f"{NAME}-{package.version}"
    if not home.exists():
        debs = cache / "debs"
        debs.mkdir(parents=True, exist_ok=True)
        archives = debian.fetch([package], "sid", machine_mirror(), architecture, debs)
        unpacked = home.with_suffix(".partial")
        debian.unpack(archives, unpacked)
        unpacked.rename(home)
    return str(home / "usr/bin" / NAME)


@asynccontextmanager
async def running_vsock_daemon(program: str, path: Path, control: Path) -> AsyncIterator[int]:
    """Run the daemon for the block; yields the descriptor of QEMU's connection to it.

    `path` becomes the host's socket, `control` QEMU's. The descriptor is closed at the end.

    Raises:
        BootError: it does not start, or `path` cannot be used.
    """
    options = ["--guest-cid=3", f"--uds-path={path}", f"--socket={control}"]
    with (
        claimed(path),
        started([program, *options], output=sys.stderr.fileno()) as daemon,
        await daemon.outlive(partial(connected, control), within_s=_PATIENCE_S) as connection,
    ):
        yield connection.fileno()
