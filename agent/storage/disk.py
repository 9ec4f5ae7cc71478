"""The storage disk: probed, formatted when empty, mounted, laid out, and let go of at the end.

A disk is touched only when the boot configuration names it, and formatted only when it is empty
beyond doubt. No failure to mount ever leads to formatting.
"""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import attrs

from agent.errors import AgentError, cause_of, failing_as
from agent.linux.mount import (
    MNT_DETACH,
    MS_BIND,
    MS_NOATIME,
    MS_RDONLY,
    MS_REMOUNT,
    mount,
    umount2,
)
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# What hosts find at the root of the disk when they mount it in another VM.
LAYOUT = ("overlays", "layers", "workspace")
MIB = 1024 * 1024
BLKID_NOTHING_FOUND = 2
FORMAT_LIMIT_S = 120


@attrs.frozen
class Disk:
    """The file system that storage lives on.

    ``device`` is what the boot configuration names, or None where ``directory`` is simply there
    (outside the image, or bound in by whoever started us) or lives in memory.
    """

    directory: Path
    device: str | None = None
    in_memory: bool = False
    workspace_mount: Path | None = None
    """Where the VM itself sees the workspace; None where the VM is not ours."""

    def bring_up(self) -> None:
        """Mount the storage and make its layout; an empty device is formatted first.

        Done already, by an agent that died since, it changes nothing. Blocks.

        Raises:
            AgentError: MOUNT_FAILED or FORMAT_FAILED, with what was found on the device.
        """
        if self.device is not None and not self.is_mounted:
            found = signature(self.device)
            if found is None:
                refuse_unless_blank(self.device)
                format_ext4(self.device)
            elif found != "ext4":
                raise AgentError(
                    ErrorCode.FORMAT_FAILED,
                    f"mount {self.device}: it holds {found}, not the ext4 of a storage disk; "
                    "give another disk, or wipe this one",
                )
            self._mount(self.device, "ext4", MS_NOATIME)
        elif self.in_memory and not self.is_mounted:
            self._mount("innkeep-storage", "tmpfs", MS_NOATIME)
        with failing_as(ErrorCode.MOUNT_FAILED, f"lay out {self.directory}"):
            for name in LAYOUT:
                (self.directory / name).mkdir(parents=True, exist_ok=True)
        if self.workspace_mount is not None and not self.workspace_mount.is_mount():
            with failing_as(ErrorCode.MOUNT_FAILED, f"mount {self.workspace_mount}"):
                self.workspace_mount.mkdir(exist_ok=True)
                mount(self.workspace, self.workspace_mount, flags=MS_BIND)

    @property
    def workspace(self) -> Path:
        """The directory that the VM and all its containers share."""
        return self.directory / "workspace"

    @property
    def is_mounted(self) -> bool:
        """Whether the directory holds the storage, rather than the mount point below it."""
        if self.device is None and not self.in_memory:
            return self.directory.is_dir()
        return self.directory.is_mount()

    def let_go(self) -> None:
        """Write everything back and unmount, or at least make the file system read-only. Blocks.

        The caller has unmounted what lies on it.

        Raises:
            OSError: neither worked; data that was synced is safe all the same.
        """
        os.sync()
        if self.workspace_mount is not None and self.workspace_mount.is_mount():
            umount2(self.workspace_mount, MNT_DETACH)
        if self.device is None or not self.is_mounted:
            return
        try:
            umount2(self.directory)
        except OSError as error:
            log.warning("unmount %s: %s; making it read-only", self.directory, cause_of(error))
            mount(None, self.directory, flags=MS_REMOUNT | MS_RDONLY)

    def _mount(self, source: str, fstype: str, flags: int) -> None:
        with failing_as(ErrorCode.MOUNT_FAILED, f"mount {source} as {fstype}"):
            self.directory.mkdir(parents=True, exist_ok=True)
            mount(source, self.directory, fstype=fstype, flags=flags)


def signature(device: str) -> str | None:
    """What blkid(8) sees on the device ("ext4", "dos"), or None where it sees nothing.

    Raises:
        AgentError: MOUNT_FAILED; the device cannot be probed.
    """
    with failing_as(ErrorCode.MOUNT_FAILED, f"probe {device}"):
        probe = subprocess.run(
            ["blkid", "-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE", device],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FORMAT_LIMIT_S,
        )
        if probe.returncode == BLKID_NOTHING_FOUND:
            return None
        probe.check_returncode()
    found = probe.stdout.decode(errors="replace").split()
    return found[0] if found else "a signature of no known type"


def refuse_unless_blank(device: str) -> None:
    """blkid does not know everything: only a device whose ends are zero counts as empty.

    Raises:
        AgentError: FORMAT_FAILED; there is something in its first or last MiB.
    """
    with failing_as(ErrorCode.FORMAT_FAILED, f"read {device}"), Path(device).open("rb") as disk:
        for offset, whence in ((0, os.SEEK_SET), (-MIB, os.SEEK_END)):
            try:
                disk.seek(offset, whence)
            except OSError:
                disk.seek(0)
            if any(disk.read(MIB)):
                raise AgentError(
                    ErrorCode.FORMAT_FAILED,
                    f"format {device}: it holds data of no known file system; "
                    "zero its first and last MiB if it is to be storage",
                )


def format_ext4(device: str) -> None:
    """Make an ext4 file system, all of it for us: no blocks are kept back for root. Blocks.

    Raises:
        AgentError: FORMAT_FAILED, with mke2fs's own words.
    """
    with failing_as(ErrorCode.FORMAT_FAILED, f"format {device}"):
        subprocess.run(
            ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-L", "innkeep", device],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=FORMAT_LIMIT_S,
        )
    log.info("formatted %s, which was empty", device)
