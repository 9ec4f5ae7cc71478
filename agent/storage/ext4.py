"""ext4 on a device: made, found out about, checked, grown.

What is read of the superblock stands at fixed places:
https://docs.kernel.org/filesystems/ext4/super.html
"""

from __future__ import annotations

import logging
import struct
import subprocess
from pathlib import Path

import attrs

from agent.errors import AgentError, cause_of, failing_as
from agent.linux.programs import path_of
from agent.storage import device as devices
from agent.storage.unfinished import marked
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

MAKE_LIMIT_S = 120
# A discard of the whole device would take the mark with it.
_MAKING = ("-q", "-t", "ext4", "-m", "0", "-E", "nodiscard", "-L", "innkeep")

_AT = 1024
_BYTES = 1024
_IS_CLEAN, _HAS_ERRORS = 1, 2
_NEEDS_RECOVERY, _IS_64BIT = 0x4, 0x80
# Less than that is no block group's worth, and resize2fs leaves it.
_WORTH_GROWING_BYTES = 16 << 20
# e2fsck(8), EXIT CODE: 1 is corrected, 2 is corrected and to be rebooted if it is mounted.
_CORRECTED = 3
_LONGEST_WORDS = 300


@attrs.frozen
class Superblock:
    """What matters here of one."""

    size_bytes: int
    """Of the whole file system."""
    is_clean: bool
    """Whether it was unmounted in good order, with no error found meanwhile."""
    was_mounted: bool
    """Whether it ever was since it was made."""

    @classmethod
    def read(cls, device: str) -> Superblock:
        """The one at the beginning of ``device``, which holds ext4. Raises OSError."""
        with Path(device).open("rb") as file:
            file.seek(_AT)
            block = file.read(_BYTES).ljust(_BYTES, b"\0")
        (blocks,) = struct.unpack_from("<I", block, 0x4)
        (log_block_bytes,) = struct.unpack_from("<I", block, 0x18)
        mounted_at, _, mounts = struct.unpack_from("<IIH", block, 0x2C)
        (state,) = struct.unpack_from("<H", block, 0x3A)
        (features,) = struct.unpack_from("<I", block, 0x60)
        if features & _IS_64BIT:
            blocks |= struct.unpack_from("<I", block, 0x150)[0] << 32
        in_order = state & _IS_CLEAN and not state & _HAS_ERRORS
        return cls(
            size_bytes=blocks << (10 + log_block_bytes),
            is_clean=bool(in_order and not features & _NEEDS_RECOVERY),
            was_mounted=bool(mounted_at or mounts),
        )


def make(device: str) -> None:
    """Make a file system, all of it for us: no blocks are kept back for root. Blocks.

    Whenever this ends before it is done, the disk has a mark that it may be done again.

    Raises:
        AgentError: FORMAT_FAILED, with mke2fs's own words.
    """
    with failing_as(ErrorCode.FORMAT_FAILED, f"format {device}"), marked(device):
        subprocess.run(
            ["mke2fs", *_MAKING, device],
            executable=path_of("mke2fs"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=MAKE_LIMIT_S,
        )
    log.info("formatted %s, which was empty", device)


def check(device: str) -> None:
    """See to it that the file system can be mounted and trusted; it is not mounted. Blocks.

    One that was left in the middle of something, by a power cut or with an error, has its journal
    replayed, and is mended as far as that loses nothing (e2fsck -p).

    Raises:
        AgentError: MOUNT_FAILED; more is wrong than that, or the device is smaller than what is
            on it. Nothing is done about it then.
    """
    with failing_as(ErrorCode.MOUNT_FAILED, f"check {device}"):
        superblock = Superblock.read(device)
        there = devices.size_of(device)
        if superblock.size_bytes > there:
            raise AgentError(
                ErrorCode.MOUNT_FAILED,
                f"mount {device}: its file system has {superblock.size_bytes} bytes and the disk "
                f"only {there}, so the rest was cut off; make the disk as large as it was",
            )
        if superblock.is_clean:
            return
        checked = subprocess.run(
            ["e2fsck", "-p", device],
            executable=path_of("e2fsck"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    said = " ".join((checked.stdout + checked.stderr).decode(errors="replace").split())
    if checked.returncode & ~_CORRECTED:
        raise AgentError(
            ErrorCode.MOUNT_FAILED,
            f"mount {device}: its file system is damaged, and e2fsck -p mends only what loses "
            f"nothing; run e2fsck on the disk by hand: {said[-_LONGEST_WORDS:]}",
        )
    log.info("%s was not unmounted in good order: %s", device, said)


def grow(device: str) -> None:
    """Let a mounted file system take up all of its device, if that has grown. Blocks.

    What fails is logged: the file system is as good as it was.
    """
    try:
        there = devices.size_of(device)
        before = Superblock.read(device).size_bytes
        if there - before < _WORTH_GROWING_BYTES:
            return
        subprocess.run(
            ["resize2fs", device],
            executable=path_of("resize2fs"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.error("grow the file system on %s: %s", device, cause_of(error))
        return
    log.info("%s has grown from %d to %d bytes", device, before, there)
