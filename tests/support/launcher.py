"""A stand-in for the smolvm launcher: the image's tree as the root of a kernel that is not its own.

The image's kernel has as modules what the launcher's has built in. So a tiny initramfs loads them,
mounts the root, and is gone by the time that the tree's init runs: that finds a kernel without
modules, a root that is mounted, and its configuration in the environment alone.

`python -m tests.support.launcher` is to this what `initramfs.boot` is to the image.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import trio

from initramfs import qemu
from initramfs.architecture import ARCHITECTURES, machine_architecture
from initramfs.boot import AGENT_PORT, READY_PORT, doorbell_at
from initramfs.child import started
from initramfs.console import Console
from initramfs.cpio import write_cpio
from initramfs.foreground import Machine as Attended
from initramfs.foreground import attend
from initramfs.machine import Kind
from initramfs.virtiofs import shared
from initramfs.vsock_daemon import find_vsock_daemon, running_vsock_daemon
from tests.support.machine import PROJECT, Machine, starting
from tests.support.qemu import Qemu

BUILD = PROJECT / "build"
TREE = BUILD / "rootfs"
ROOT_TAG = "tree"
MEMORY_BYTES = 1 << 30
PATIENCE_S = 180
# As the kernel's own: it hands over whatever it does not know, and no module's file is left.
INIT = """\
#!/bin/sh
/bin/busybox mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
for list in root devices; do
    while read -r module; do
        case $module in vsock_loopback.ko) continue ;; esac
        insmod "/modules/$module"
    done <"/modules/$list"
done
mount -t {fstype} {source} /root && exec /bin/busybox switch_root /root {program}
"""


@contextmanager
def launched(
    directory: Path,
    *,
    env: Mapping[str, str],
    disks: Sequence[Path] = (),
    shares: Mapping[str, Path] | None = None,
    root_share: Path | None = None,
    root_disk: Path | None = None,
    program: str = "/init",
    hardware: Qemu | None = None,
) -> Iterator[Machine]:
    """Boot the tree until the block is left; sockets and console go to `directory`.

    `disks` are /dev/vda and so on; the root is a share of `root_share`, or `root_disk`, the disk
    behind the others. `env` is the guest's, `hardware` what it has beside. Raises and blocks as
    `booted`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    all_shares = {**(shares or {}), **({ROOT_TAG: root_share} if root_share else {})}
    argv = [
        *(sys.executable, "-m", "tests.support.launcher"),
        *(f"--socket={directory / 'agent.sock'}", f"--console={directory / 'console.log'}"),
        *(f"--env={name}={value}" for name, value in env.items()),
        *(f"--disk={disk}" for disk in (*disks, *([root_disk] if root_disk else []))),
        *(f"--share={tag}={path}" for tag, path in all_shares.items()),
        f"--root={'virtiofs:' + ROOT_TAG if root_share else f'ext4:/dev/vd{chr(97 + len(disks))}'}",
        f"--program={program}",
    ]
    qemu_env = hardware.env if hardware else None
    with starting(argv, directory / "console.log", directory, env=qemu_env) as machine:
        yield machine


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--console", type=Path, required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--program", required=True)
    for name in ("env", "disk", "share"):
        parser.add_argument(f"--{name}", action="append", default=[])
    trio.run(_launch, parser.parse_args())
    return 0


async def _launch(options: argparse.Namespace) -> None:
    architecture = ARCHITECTURES[machine_architecture()]
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="innkeep-")))
        _write_image(scratch, *options.root.split(":"), options.program)
        shares = [
            stack.enter_context(shared(tag, Path(path), scratch))
            for tag, _, path in (share.partition("=") for share in options.share)
        ]
        daemon = running_vsock_daemon(
            find_vsock_daemon(architecture, BUILD / "cache"), options.socket, scratch / "control"
        )
        doorbell = await stack.enter_async_context(
            doorbell_at(Path(f"{options.socket}_{READY_PORT}"))
        )
        vsock = await stack.enter_async_context(daemon)
        hardware = qemu.Hardware(
            architecture=architecture,
            kind=Kind.TCG,
            image=scratch,
            memory_bytes=MEMORY_BYTES,
            cpus=1,
            words=options.env,
            vsock_socket=vsock,
            shares=shares,
        )
        argv = qemu.command_line(hardware)
        for number, disk in enumerate(options.disk):
            argv += ["-drive", f"if=none,id=disk{number},format=raw,file={disk}"]
            argv += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        pass_fds = [vsock, *(share.socket for share in shares)]
        child = stack.enter_context(started(argv, pass_fds=pass_fds))
        console = stack.enter_context(options.console.open("wb"))
        machine = Attended(child, f"mux:{options.socket}:{AGENT_PORT}", doorbell)
        await attend(machine, Console(console.fileno()), PATIENCE_S)


def _write_image(directory: Path, fstype: str, source: str, program: str) -> None:
    """What QEMU is to find in `directory`: the image's kernel, and the initramfs."""
    (directory / "vmlinux").symlink_to(BUILD / "vmlinux")
    early = directory / "early"
    for folder in ("bin", "dev", "proc", "root"):
        (early / folder).mkdir(parents=True)
    shutil.copy(TREE / "usr/bin/busybox", early / "bin/busybox")
    (early / "bin/sh").symlink_to("busybox")
    (early / "init").write_text(INIT.format(fstype=fstype, source=source, program=program))
    (early / "init").chmod(0o755)
    base = BUILD / "cache" / f"base-{machine_architecture()}"
    shutil.copytree(base / "modules", early / "modules")
    with (directory / "initramfs.cpio").open("wb") as file:
        write_cpio(early, file, epoch=0)


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
