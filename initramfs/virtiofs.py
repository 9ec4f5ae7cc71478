"""Directories of this machine for a VM, over virtiofs."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from initramfs import qemu
from initramfs.child import started
from initramfs.errors import BootError
from initramfs.sockets import claimed

# Debian's package virtiofsd; and until Debian 12 there was one in C that came with QEMU.
_VIRTIOFSD = Path("usr/libexec/virtiofsd")
_VIRTIOFSD_OF_QEMU = Path("usr/lib/qemu/virtiofsd")


@contextmanager
def shared(tag: str, directory: Path, scratch: Path) -> Iterator[qemu.Share]:
    """A virtiofsd for the block, and the connection to it that is to be QEMU's."""
    if not directory.is_dir():
        raise BootError(f"{directory}: there is no such directory to share")
    control = scratch / f"share-{tag}"
    with (
        claimed(control),
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        listener.bind(str(control))
        listener.listen()
        # It waits there until the daemon accepts it: nobody has to know when that is.
        connection.connect(str(control))
        command = virtiofsd(directory, listener.fileno())
        with started(command, pass_fds=[listener.fileno()], output=sys.stderr.fileno()):
            yield qemu.Share(tag, connection.fileno())


def virtiofsd(directory: Path, listener: int, root: Path = Path("/")) -> list[str]:
    """The command that shares a directory with who connects to a listening socket.

    Of the two daemons that there are the one that is installed below `root`.

    Raises:
        BootError: there is none.
    """
    if (program := root / _VIRTIOFSD).exists():
        return [str(program), f"--shared-dir={directory}", f"--fd={listener}", "--log-level=error"]
    if (program := root / _VIRTIOFSD_OF_QEMU).exists():
        source = str(directory).replace("\\", "\\\\").replace(",", "\\,")
        return [str(program), "-f", "-o", f"source={source},log_level=err", f"--fd={listener}"]
    raise BootError(
        "virtiofsd is missing: install the package virtiofsd (Debian 12: qemu-system-common)"
    )
