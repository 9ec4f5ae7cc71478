"""EROFS images of layers: mounting them, and the marks that are kept behind the file system.

https://erofs.docs.kernel.org/en/latest/core_ondisk.html
"""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import attrs

from agent.linux.loop import loop_device
from agent.linux.mount import (
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    closing,
    fsconfig_create,
    fsconfig_set_flag,
    fsconfig_set_string,
    fsmount,
    fsopen,
)

# The superblock, 1024 bytes into the image: magic, (checksum, features,) the block size as a power
# of two, (…) and the number of blocks.
_SUPERBLOCK = struct.Struct("<I8xB23xI")
_SUPERBLOCK_START = 1024
_MAGIC = 0xE0F5E1E2

_OPAQUE_ROOT = b"o"
_IMPLIED = b"i"


@attrs.frozen
class Marks:
    """What a layer means for the layers below it, beyond what overlayfs sees in its image.

    ``implied`` are the directories that the layer's tar has no entry for (`b""` is the root):
    they are there, but say nothing of modes and owners. With ``opaque_root`` the layer hides all
    layers below it.
    """

    implied: frozenset[bytes] = frozenset()
    opaque_root: bool = False


def detached_mount(image: Path, tar: Path) -> int:
    """The image mounted read-only, attached nowhere; the descriptor is the caller's to close.

    ``tar`` is what it was made of, where the contents of its files are.

    Setuid programs and devices are of no effect here; in an overlay of it they are.

    Raises:
        OSError: the kernel cannot mount it.
    """
    try:
        return _mounted(image, tar)
    except OSError as error:
        # Before Linux 6.12, or without CONFIG_EROFS_FS_BACKED_BY_FILE.
        if error.errno != errno.ENOTBLK:
            raise
    with loop_device(image) as device, loop_device(tar) as data_device:
        return _mounted(device, data_device)


def append_marks(image: Path, marks: Marks) -> None:
    """Put a layer's marks behind the file system in its image."""
    records = [_IMPLIED + path for path in sorted(marks.implied)]
    records += [_OPAQUE_ROOT] * marks.opaque_root
    with image.open("r+b") as file:
        file.seek(_end(file.read(_SUPERBLOCK_START + _SUPERBLOCK.size)))
        file.write(b"\0".join(records))
        file.truncate()


def read_marks(image: Path) -> Marks:
    """The marks in a layer's image.

    Raises:
        OSError: it is not there, or damaged.
    """
    with image.open("rb") as file:
        file.seek(_end(file.read(_SUPERBLOCK_START + _SUPERBLOCK.size)))
        records = file.read().split(b"\0")
    return Marks(
        implied=frozenset(record[1:] for record in records if record.startswith(_IMPLIED)),
        opaque_root=_OPAQUE_ROOT in records,
    )


def _end(start: bytes) -> int:
    """Where the file system ends in an image that starts so."""
    if len(start) == _SUPERBLOCK_START + _SUPERBLOCK.size:
        magic, block_bits, blocks = _SUPERBLOCK.unpack_from(start, _SUPERBLOCK_START)
        if magic == _MAGIC:
            end: int = blocks << block_bits
            return end
    raise OSError(errno.EUCLEAN, "there is no EROFS superblock")


def _mounted(source: Path | str, data: Path | str) -> int:
    with closing(fsopen("erofs")) as context:
        fsconfig_set_string(context, "source", source)
        fsconfig_set_string(context, "device", data)
        fsconfig_set_flag(context, "ro")
        fsconfig_create(context)
        return fsmount(context, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
