"""Start the image, and stay in the foreground until it ends or SIGTERM ends it.

Prints one line on stdout, `ready ADDRESS`, once the agent has answered a ping; ADDRESS is for
`innkeep --connect`. The machine's console goes to stderr, or to a file. In a VM the loopback of
this machine is 10.0.2.2, so a registry there is named `10.0.2.2:PORT`; namespaces share the
network.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Any

import trio
from attrs import evolve

from initramfs import namespaces, qemu
from initramfs.architecture import ARCHITECTURES
from initramfs.child import started
from initramfs.console import Console
from initramfs.cpio import write_cpio
from initramfs.errors import BootError, BuildError
from initramfs.foreground import Machine, attend
from initramfs.machine import Choice, Host, Kind, Network, boot_words, choose, parse_size
from initramfs.sockets import claimed
from initramfs.virtiofs import shared
from initramfs.vsock_daemon import find_vsock_daemon, running_vsock_daemon
from protocol.spelling import misspelt_flag

AGENT_PORT = 6000
READY_PORT = 6004
# Beside the agent's; in namespaces, as behind a VMM's unix socket, a path has them behind it.
WORKLOAD_PORTS = (5000, 5001)
# Where init looks for mirrors.
HOSTS_IN_INITRAMFS = "certs.d"
_PATIENCE_S = {Kind.KVM: 60, Kind.TCG: 180, Kind.NAMESPACES: 60}


def main() -> int:
    """Boot; the exit status is 0 where the machine was ended by us, or powered itself off."""
    parser, flags = _parser()
    if (complaint := misspelt_flag(sys.argv[1:], flags)) is not None:
        parser.error(complaint)
    options = parser.parse_args()
    # Of a lone `--` argparse makes [] before Python 3.13.
    if any(word in ([], "--") for word in options.append):
        parser.error("--append: `--` says nothing alone; write '--append=-- WORDS'")
    options.image = options.image.absolute()
    try:
        trio.run(_boot, options)
    except (BootError, BuildError) as error:
        print(f"initramfs.boot: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and the names that its arguments begin with."""
    parser = argparse.ArgumentParser(
        prog="python -m initramfs.boot", description=__doc__, allow_abbrev=False
    )
    flags = ["--help"]

    def option(flag: str, **more: Any) -> None:
        flags.append(flag)
        parser.add_argument(flag, **more)

    option("--machine", choices=["auto", *Kind], default="auto", help="auto: KVM, else TCG")
    option("--image", type=Path, default=Path("build"), metavar="DIR", help="default: build")
    option("--socket", type=Path, metavar="PATH", help="the host's end, where it is a unix socket")
    option(
        "--storage",
        type=Path,
        metavar="FILE|DIR",
        help="a disk image, made if it is missing, or a directory (a VM's is its storage.img); "
        "without one, images go with the machine",
    )
    option(
        "--root-disk",
        type=Path,
        metavar="FILE",
        help="a disk image, made if it is missing, that keeps the changes to a VM's own root; "
        "without one, they go with the VM",
    )
    option(
        "--disk",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a further disk image for a VM to read, behind those of --storage and --root-disk: "
        "/dev/vda, /dev/vdb and so on; may be repeated",
    )
    option("--memory", type=_size, default="1G", metavar="SIZE", help="default: 1G")
    option("--cpus", type=int, metavar="N", help="default: 2, emulated 1")
    option(
        "--share",
        type=_share,
        action="append",
        default=[],
        metavar="TAG=DIR",
        help="a directory of this machine, for a VM's containers to mount by its tag (virtiofs); "
        "may be repeated",
    )
    option(
        "--insecure-registry",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a registry to speak plain HTTP to, as the machine names it; may be repeated",
    )
    option(
        "--hosts-dir",
        type=Path,
        metavar="DIR",
        help="mirrors of registries, as the machine names them, in containerd's format: "
        "DIR/HOST[:PORT]/hosts.toml; the machine gets a copy",
    )
    option(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="with the token that opens the workload's ports; without one they refuse everybody",
    )
    option("--console", type=Path, metavar="FILE", help="default: stderr")
    option(
        "--append",
        action="append",
        default=[],
        metavar="WORD",
        help="more boot configuration, innkeep.KEY=VALUE; may be repeated",
    )
    return parser, flags


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _share(text: str) -> tuple[str, Path]:
    tag, _, directory = text.partition("=")
    # The device has 36 bytes for the tag (virtio 1.2, 5.11.4), and the agent a directory's name.
    if not (tag and directory) or "/" in tag or tag in (".", "..") or len(os.fsencode(tag)) > 36:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no TAG=DIR, with a tag of at most 36 bytes and without a slash"
        )
    return tag, Path(directory).absolute()


async def _boot(options: argparse.Namespace) -> None:
    choice = choose(options.machine, Host.inspect())
    if choice.notice:
        print(f"initramfs.boot: {choice.notice}", file=sys.stderr)
    with ExitStack() as stack:
        console = sys.stderr if options.console is None else _opened(stack, options.console)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="innkeep-")))
        if choice.kind is Kind.NAMESPACES:
            machine = _in_namespaces(options, scratch)
        else:
            machine = _in_vm(options, choice, scratch)
        async with machine as running:
            await attend(running, Console(console.fileno()), _PATIENCE_S[choice.kind])


@asynccontextmanager
async def _in_namespaces(options: argparse.Namespace, scratch: Path) -> AsyncIterator[Machine]:
    if options.share:
        raise BootError(
            "namespaces have no virtiofs, --share is for VMs: name a directory where a tag would be"
        )
    if options.root_disk:
        raise BootError("namespaces have no disks: --root-disk is for VMs")
    if options.disk:
        raise BootError("namespaces have no disks, --disk is for VMs")
    rootfs: Path = options.image / "rootfs"
    if not (rootfs / "init").exists():
        raise BootError(f"no image in {options.image}: run `make image`")
    # Not memory: EROFS mounts no file on a tmpfs without a loop device, and those are this
    # machine's. The scratch directory goes with the machine as memory would.
    storage = _directory(options.storage or scratch / "storage")
    socket = (options.socket or scratch / "agent.sock").absolute()
    rooms = namespaces.Rooms(
        rootfs=rootfs,
        scratch=scratch / "root",
        sockets=socket.parent,
        storage=storage,
        token_file=_token_file(options.token_file),
        mirrors=_mirrors(options.hosts_dir, scratch),
        words=boot_words(
            "dir",
            listen=f"unix:{namespaces.SOCKETS / socket.name}",
            insecure_registries=options.insecure_registry,
            # As a VM's vsock ports are seen here.
            more=[
                f"innkeep.host_sockets={namespaces.SOCKETS / socket.name}",
                *options.append,
            ],
        ),
    )
    rooms.scratch.mkdir()
    with claimed(socket), ExitStack() as stack:
        for port in WORKLOAD_PORTS:
            stack.callback(Path(f"{socket}_{port}").unlink, missing_ok=True)
        async with namespaces.namespace_machine(rooms) as child:
            yield Machine(child, f"unix:{socket}")


@asynccontextmanager
async def _in_vm(
    options: argparse.Namespace, choice: Choice, scratch: Path
) -> AsyncIterator[Machine]:
    try:
        manifest = json.loads((options.image / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BootError(f"no image in {options.image}: run `make image`") from error
    architecture = ARCHITECTURES[manifest["architecture"]]
    disk, root_disk = _disk(options.storage), _disk(options.root_disk)
    mirrors = _mirrors(options.hosts_dir, scratch)
    hardware = qemu.Hardware(
        architecture=architecture,
        kind=choice.kind,
        image=options.image,
        initramfs=_initramfs_with(mirrors.parent, options.image, scratch) if mirrors else None,
        memory_bytes=options.memory,
        # Emulated ones take turns on one thread, and only cost each other time.
        cpus=options.cpus or (2 if choice.kind is Kind.KVM else 1),
        disk=disk,
        root_disk=root_disk,
        disks=[_file("--disk", path) for path in options.disk],
        token_file=_token_file(options.token_file),
        # Machine-wide, as process ids are; 0 to 2 have meanings of their own.
        cid=3 + os.getpid(),
        words=boot_words(
            "memory" if disk is None else "/dev/vda",
            root=None if root_disk is None else "/dev/vda" if disk is None else "/dev/vdb",
            network=Network(),
            insecure_registries=options.insecure_registry,
            more=options.append,
        ),
    )
    tags = [tag for tag, _ in options.share]
    if twice := {tag for tag in tags if tags.count(tag) > 1}:
        raise BootError(f"--share: {min(twice)} is the tag of two")
    async with AsyncExitStack() as stack:
        shares = [
            stack.enter_context(shared(tag, directory, scratch)) for tag, directory in options.share
        ]
        hardware = evolve(hardware, shares=shares)
        fds = [share.socket for share in shares]
        if choice.host_vsock:
            child = stack.enter_context(started(qemu.command_line(hardware), pass_fds=fds))
            yield Machine(child, f"vsock:{hardware.cid}:{AGENT_PORT}")
            return
        socket = (options.socket or scratch / "agent.sock").absolute()
        program = find_vsock_daemon(architecture, options.image / "cache")
        doorbell = await stack.enter_async_context(doorbell_at(Path(f"{socket}_{READY_PORT}")))
        daemon = running_vsock_daemon(program, socket, scratch / "control.sock")
        fd = await stack.enter_async_context(daemon)
        command = qemu.command_line(evolve(hardware, vsock_socket=fd))
        child = stack.enter_context(started(command, pass_fds=[fd, *fds]))
        yield Machine(child, f"mux:{socket}:{AGENT_PORT}", doorbell)


@asynccontextmanager
async def doorbell_at(path: Path) -> AsyncIterator[trio.SocketListener]:
    """What the guest's connect to its host's port arrives at."""
    with claimed(path):
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen()
        async with trio.SocketListener(listener) as doorbell:
            yield doorbell


def _directory(storage: Path) -> Path:
    """Where a machine of namespaces keeps its images."""
    if storage.is_file():
        raise BootError(f"{storage}: namespaces keep images in a directory, not in a file")
    storage.mkdir(parents=True, exist_ok=True)
    return storage.absolute()


def _token_file(path: Path | None) -> Path | None:
    return None if path is None else _file("--token-file", path)


def _file(option: str, path: Path) -> Path:
    if not path.is_file():
        raise BootError(f"{option} {path}: there is no such file")
    return path.absolute()


def _mirrors(hosts_dir: Path | None, scratch: Path) -> Path | None:
    """A copy of the directory as it is now, with what its links lead to: certificates often are
    some, and lead to places of this machine."""
    if hosts_dir is None:
        return None
    if not hosts_dir.is_dir():
        raise BootError(f"--hosts-dir {hosts_dir}: there is no such directory")
    copy = scratch / "more" / HOSTS_IN_INITRAMFS
    try:
        shutil.copytree(hosts_dir, copy)
    except (OSError, shutil.Error) as error:
        raise BootError(f"--hosts-dir {hosts_dir}: {error}") from error
    return copy


def _initramfs_with(tree: Path, image: Path, scratch: Path) -> Path:
    """The image's initramfs, and an archive of a tree behind it."""
    initramfs = scratch / "initramfs.cpio"
    shutil.copyfile(image / "initramfs.cpio", initramfs)
    with initramfs.open("ab") as file:
        write_cpio(tree, file, epoch=0)
    return initramfs


def _disk(storage: Path | None) -> Path | None:
    """A disk of a VM, made if there is none yet."""
    if storage is None:
        return None
    disk = storage / "storage.img" if storage.is_dir() else storage
    qemu.make_disk(disk)
    return disk.absolute()


def _opened(stack: ExitStack, path: Path) -> IO[bytes]:
    try:
        return stack.enter_context(path.open("wb"))
    except OSError as error:
        raise BootError(f"cannot write the console to {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
