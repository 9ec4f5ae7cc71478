"""A machine without a kernel of its own: the image's root filesystem in namespaces of this machine.

Everything but the network is its own: mounts, processes, hostname, and a part of cgroup2. All of
it ends with the machine's init, and that ends with us, however we end.
"""

import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from attrs import frozen

from agent.linux import mount
from agent.processes.cgroup import Cgroup
from initramfs.child import Child, started
from initramfs.errors import BootError

_SCRIPT = Path(__file__).parent / "namespaces.sh"
_NAMES = re.compile(r"innkeep-machine-(\d+)")
# Where the script puts the directory of the socket.
SOCKETS = Path("/run/host")


@frozen(kw_only=True)
class Rooms:
    """What the machine gets of this one: directories, and the words of its boot configuration."""

    rootfs: Path
    scratch: Path
    sockets: Path
    storage: Path
    token_file: Path | None = None
    mirrors: Path | None = None
    """With the configuration of mirrors."""
    words: Sequence[str]


def command_line(rooms: Rooms, cgroup: Path) -> list[str]:
    """The programs that become the machine's init, each the next one's parent or itself."""
    enter = 'echo 0 >"$0/cgroup.procs" && exec "$@"'
    namespaces = ["--mount", "--pid", "--ipc", "--uts", "--cgroup"]
    directories = [rooms.rootfs, rooms.scratch, rooms.sockets, rooms.storage]
    return [
        *("sh", "-c", enter, str(cgroup)),
        *("unshare", *namespaces, "--propagation=private", "--fork", "--kill-child"),
        *("sh", str(_SCRIPT), *map(str, directories), str(rooms.token_file or "")),
        str(rooms.mirrors or ""),
    ]


@asynccontextmanager
async def namespace_machine(rooms: Rooms) -> AsyncIterator[Child]:
    """Run the machine for the block; nothing of it is left afterwards.

    Raises:
        BootError: not root, or no cgroup2 in this kernel.
    """
    if os.geteuid() != 0:
        raise BootError("a machine of namespaces needs root: use sudo")
    with _cgroup2() as hierarchy:
        _clear_away(hierarchy)
        cgroup = Cgroup(hierarchy / f"innkeep-machine-{os.getpid()}")
        cgroup.path.mkdir()
        try:
            env = {
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": "/root",
                "INNKEEP_CMDLINE": " ".join(rooms.words),
            }
            with started(command_line(rooms, cgroup.path), env=env) as child:
                yield child
        finally:
            cgroup.kill()
            with trio.CancelScope(shield=True):
                await cgroup.removed()


@contextmanager
def _cgroup2() -> Iterator[Path]:
    """This process's own place in cgroup2, wherever or whether this machine has it mounted.

    The path is valid for us and our children only, and only in the block.
    """
    own = next(
        (
            line.removeprefix("0::/")
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        ),
        None,
    )
    if own is None:
        raise BootError("this kernel has no cgroup2")
    with mount.closing(mount.fsopen("cgroup2")) as context:
        mount.fsconfig_create(context)
        with mount.closing(mount.fsmount(context)) as root:
            yield Path(f"/proc/{os.getpid()}/fd/{root}") / own


def _clear_away(hierarchy: Path) -> None:
    """Remove what machines left behind whose boot.py was killed; they died with it."""
    for path in hierarchy.glob("innkeep-machine-*"):
        match = _NAMES.fullmatch(path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            Cgroup(path).remove()
