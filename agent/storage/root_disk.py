"""The disk that keeps the changes to the VM's own root: the upper directory of that overlay.

init has it opened before there is a root to switch to (initramfs/open_root_disk.py), by the rules
of the storage disk; the agent only lets go of it in the end. In the VM it is at /mnt/root,
read-only, for whoever wants to know what takes its room.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs

from agent.errors import AgentError, cause_of, failing_as
from agent.linux.fifreeze import fifreeze
from agent.linux.mount import MS_NOATIME, MS_RDONLY, MS_REMOUNT, mount, umount2
from agent.storage import ext4
from agent.storage.disk import prepare
from agent.storage.write_back import write_back
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# No name that somebody else's disk has already, an earlier root of another system included.
_KEPT = Path("innkeep-root")
# Each boot says these anew, or not at all.
_OF_ONE_BOOT = ("etc/hostname", "etc/resolv.conf", "etc/innkeep/token")


@attrs.frozen
class RootDisk:
    """An ext4, mounted at ``directory``, that holds the upper and the work directory of the root;
    or the disk that is the root itself."""

    directory: Path

    def open(self, device: str) -> None:
        """Mount ``device``, checked and grown, or made where it was empty, with both directories.

        What the last boot was told, and this one may not be, is taken out of the upper. Blocks.

        Raises:
            AgentError: MOUNT_FAILED or FORMAT_FAILED, with what is on the device. It is not
                mounted then, and nothing that was there has changed.
        """
        prepare(device)
        with failing_as(ErrorCode.MOUNT_FAILED, f"mount {device} as ext4"):
            mount(device, self.directory, fstype="ext4", flags=MS_NOATIME)
        try:
            ext4.grow(device)
            with failing_as(ErrorCode.MOUNT_FAILED, f"keep the root's changes on {device}"):
                for name in ("upper", "work"):
                    (self.directory / _KEPT / name).mkdir(parents=True, exist_ok=True)
                for name in _OF_ONE_BOOT:
                    _forget(self.directory / _KEPT / "upper", name)
        except BaseException:
            umount2(self.directory)
            raise

    def let_go(self) -> None:
        """Write everything back, and leave the file system on the disk in good order. Blocks.

        Where somebody has a file open for writing it cannot become read-only; then it is frozen.

        Raises:
            OSError: neither worked; data that was synced is safe all the same.
        """
        write_back(self.directory)
        try:
            mount(None, self.directory, flags=MS_REMOUNT | MS_RDONLY)
        except OSError as error:
            log.warning("make the root read-only: %s; freezing it", cause_of(error))
            fifreeze(self.directory)


def _forget(upper: Path, name: str) -> None:
    """Remove a file, or what hides it, from an upper directory; through no link, which would lead
    out of it. Raises OSError."""
    *folders, file = name.split("/")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    directory = os.open(upper, flags)
    try:
        for folder in folders:
            inner = os.open(folder, flags, dir_fd=directory)
            os.close(directory)
            directory = inner
        os.unlink(file, dir_fd=directory)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        pass
    except OSError as error:
        # Most likely a link in a folder's place: what the boot says goes where that leads.
        log.warning("%s stays on the root's disk: %s", name, cause_of(error))
    finally:
        os.close(directory)


def main(argv: Sequence[str]) -> int:
    """What init calls with a device and a mount point; stdout says what is wrong, if anything."""
    device, directory = argv
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="init: %(message)s")
    try:
        RootDisk(Path(directory)).open(device)
    except AgentError as error:
        print(error.message)
        return 1
    return 0
