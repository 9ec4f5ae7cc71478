"""The storage disk: probed, formatted when empty, mounted, laid out, and let go of at the end.

A disk is touched only when the boot configuration names it, and formatted only when it is empty
beyond doubt. No failure to mount ever leads to formatting.
"""

from __future__ import annotations

import errno
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
from agent.linux.programs import path_of
from agent.storage import ext4
from agent.storage.device import is_read_only, refuse_unless_blank, signature
from agent.storage.unfinished import is_marked
from agent.storage.write_back import write_back
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# What hosts find at the root of the disk when they mount it in another VM.
LAYOUT = ("overlays", "layers", "workspace")


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
        """Mount the storage and make its layout; a device is prepared first, and grown into.

        Done already, by an agent that died since, it changes nothing. Blocks.

        Raises:
            AgentError: MOUNT_FAILED or FORMAT_FAILED, with what was found on the device.
        """
        if self.device is not None and not self.is_mounted:
            prepare(self.device)
            self._mount(self.device, "ext4", MS_NOATIME)
            ext4.grow(self.device)
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

    def write_problem(self) -> str | None:
        """Why the file system takes no writes any more, as after an error on the disk, if that is
        so; that it is full is no reason. Blocks, where it is frozen until it is not any more."""
        try:
            # Neither statvfs(3) nor its mount tells: the kernel's ext4 keeps that to itself.
            flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(self.directory, flags, 0o600))
        except OSError as error:
            if error.errno in (errno.EIO, errno.EROFS):
                return f"it takes no writes any more: {cause_of(error)}; the kernel's log says why"
        return None

    def let_go(self) -> None:
        """Write everything back and unmount, or at least make the file system read-only. Blocks.

        The caller has unmounted what lies on it.

        Raises:
            OSError: neither worked; data that was synced is safe all the same.
        """
        write_back(self.directory)
        if self.workspace_mount is not None:
            try:
                # Without a look at what is there: it may be a share, and that may not answer.
                umount2(self.workspace_mount, MNT_DETACH)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # nothing is
                    raise
        if self.device is None or not self.is_mounted:
            return
        try:
            umount2(self.directory)
        except OSError as error:
            log.warning("unmount %s: %s; making it read-only", self.directory, cause_of(error))
            mount(None, self.directory, flags=MS_REMOUNT | MS_RDONLY)

    def trim(self) -> None:
        """Give back to the host what nothing occupies any more (fstrim(8)), where that can be.

        Blocks, for as long as the device takes.
        """
        if self.device is None:
            return
        try:
            subprocess.run(
                ["fstrim", self.directory],
                executable=path_of("fstrim"),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            # A host need not offer it.
            log.debug("trim %s: %s", self.device, cause_of(error))

    def _mount(self, source: str, fstype: str, flags: int) -> None:
        with failing_as(ErrorCode.MOUNT_FAILED, f"mount {source} as {fstype}"):
            self.directory.mkdir(parents=True, exist_ok=True)
            mount(source, self.directory, fstype=fstype, flags=flags)


def prepare(device: str) -> None:
    """Let ``device``, which is not mounted, hold an ext4 that can be: whose data stay, if any.

    One whose making has not come to its end, for which nobody can have had a use, is made anew.

    Raises:
        AgentError: FORMAT_FAILED: it holds something else. MOUNT_FAILED: it cannot be read or
            written, or its ext4 is damaged or cut off.
    """
    found = signature(device)
    with failing_as(ErrorCode.MOUNT_FAILED, f"look at {device}"):
        if is_read_only(device):
            raise AgentError(
                ErrorCode.MOUNT_FAILED,
                f"mount {device}: the disk is read-only, and is to be written to; "
                "attach it for writing",
            )
    with failing_as(ErrorCode.MOUNT_FAILED, f"look at {device}"):
        is_unfinished = is_marked(device) and (
            found is None or (found == "ext4" and not ext4.Superblock.read(device).was_mounted)
        )
    if is_unfinished:
        log.warning("%s: its file system was never finished, and is made anew", device)
        ext4.make(device)
    elif found is None:
        refuse_unless_blank(device)
        ext4.make(device)
    elif found == "ext4":
        ext4.check(device)
    else:
        raise AgentError(
            ErrorCode.FORMAT_FAILED,
            f"mount {device}: it holds {found}, not the ext4 of a storage disk; "
            "give another disk, or wipe this one",
        )
