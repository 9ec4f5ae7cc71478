"""Mounting: mount(2), umount2(2), and the calls that build a mount piece by piece (fsopen(2) …).

Every function raises OSError with errno. Descriptors that come back are close-on-exec and the
caller's to close.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# sys/mount.h: flags of mount(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

# sys/mount.h: flags of umount2(2)
MNT_DETACH = 0x2

# linux/mount.h: what fsmount(2) makes of a mount
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8

# linux/mount.h: flags of open_tree(2) and move_mount(2)
MOVE_MOUNT_F_EMPTY_PATH = 0x4
_OPEN_TREE_CLONE = 0x1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

_FSOPEN_CLOEXEC = 0x1
_FSMOUNT_CLOEXEC = 0x1

# linux/mount.h: enum fsconfig_command
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6

# Since Linux 5.1 all architectures number new calls alike; glibc has wrappers only since 2.36.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

StrPath = str | os.PathLike[str]


def mount(
    source: StrPath | None,
    target: StrPath,
    *,
    fstype: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """mount(2): attach, bind, move or change a mount, as ``flags`` say."""
    result = _libc.mount(
        None if source is None else os.fsencode(source),
        os.fsencode(target),
        None if fstype is None else fstype.encode(),
        ctypes.c_ulong(flags),
        None if data is None else os.fsencode(data),
    )
    if result != 0:
        raise _error(os.fspath(target))


def umount2(target: StrPath, flags: int = 0) -> None:
    """umount2(2): detach the topmost mount at ``target``; EBUSY while something uses it."""
    if _libc.umount2(os.fsencode(target), ctypes.c_int(flags)) != 0:
        raise _error(os.fspath(target))


def fsopen(fstype: str) -> int:
    """fsopen(2): a context in which a file system of that type is configured."""
    return _syscall(_SYS_FSOPEN, fstype.encode(), ctypes.c_uint(_FSOPEN_CLOEXEC), about=fstype)


def fsconfig_set_flag(context: int, key: str) -> None:
    """FSCONFIG_SET_FLAG: an option without a value."""
    _fsconfig(context, _FSCONFIG_SET_FLAG, key, None, 0)


def fsconfig_set_string(context: int, key: str, value: StrPath) -> None:
    """FSCONFIG_SET_STRING: an option's value, at most 255 bytes long."""
    _fsconfig(context, _FSCONFIG_SET_STRING, key, os.fsencode(value), 0)


def fsconfig_create(context: int) -> None:
    """FSCONFIG_CMD_CREATE: make the superblock; what the options amount to is only checked now."""
    _fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(context: int, attributes: int = 0) -> int:
    """fsmount(2): a mount of a created context, attached nowhere; gone when its fd is closed.

    ``attributes`` are MOUNT_ATTR_*. The descriptor is an O_PATH one of the mount's root.
    """
    return _in_context(
        context, _SYS_FSMOUNT, context, ctypes.c_uint(_FSMOUNT_CLOEXEC), ctypes.c_uint(attributes)
    )


def move_mount(mount_fd: int, target: StrPath) -> None:
    """move_mount(2): attach a mount that fsmount made."""
    flags = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)
    arguments = (mount_fd, b"", AT_FDCWD, os.fsencode(target), flags)
    _syscall(_SYS_MOVE_MOUNT, *arguments, about=os.fspath(target))


def open_tree(source: StrPath | int, *, recursive: bool = True) -> int:
    """open_tree(2) with OPEN_TREE_CLONE: a copy of the mounts at and below a path or an open
    directory, attached nowhere; gone when its fd is closed and nobody's root or directory is in it.

    Not ``recursive``: without the mounts below. The source must be in the caller's mount namespace.
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    if isinstance(source, int):
        return _syscall(_SYS_OPEN_TREE, source, b"", ctypes.c_uint(flags | AT_EMPTY_PATH))
    return _syscall(
        _SYS_OPEN_TREE, AT_FDCWD, os.fsencode(source), ctypes.c_uint(flags), about=os.fspath(source)
    )


def mount_setattr(mount_fd: int, *, set_attributes: int = 0, propagation: int = 0) -> None:
    """mount_setattr(2) on a tree that open_tree made, all of it: MOUNT_ATTR_* to add, and
    MS_PRIVATE or the like."""
    attributes = struct.pack("=QQQQ", set_attributes, 0, propagation, 0)
    flags = ctypes.c_uint(AT_EMPTY_PATH | AT_RECURSIVE)
    size = ctypes.c_size_t(len(attributes))
    _syscall(_SYS_MOUNT_SETATTR, mount_fd, b"", flags, attributes, size)


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close a descriptor that one of these calls made."""
    try:
        yield fd
    finally:
        os.close(fd)


def is_mount_root(path: Path) -> bool:
    """Whether another file system is mounted at ``path``, which exists.

    For file systems of our own making, none of which is a bind mount of its parent's.
    """
    return path.lstat().st_dev != path.parent.stat().st_dev


def _fsconfig(context: int, command: int, key: str | None, value: bytes | None, aux: int) -> None:
    _in_context(
        context,
        _SYS_FSCONFIG,
        context,
        ctypes.c_uint(command),
        None if key is None else key.encode(),
        value,
        aux,
        about=None if key is None else f"{key}={os.fsdecode(value)}" if value else key,
    )


def _in_context(context: int, number: int, *arguments: object, about: str | None = None) -> int:
    """A call whose failure the kernel may explain in the context's own log."""
    try:
        return _syscall(number, *arguments, about=about)
    except OSError as error:
        explained = "; ".join(_log_of(context))
        if not explained:
            raise
        reason = f"{error.strerror}: {explained}"
        raise OSError(error.errno, reason, *([about] if about else ())) from None


def _log_of(context: int) -> Iterator[str]:
    """The messages that wait in a context, "e overlay: …" each, without their level."""
    while True:
        try:
            message = os.read(context, 4096)
        except OSError:  # ENODATA: that was all
            return
        yield message.decode(errors="replace").strip().partition(" ")[2]


def _syscall(number: int, *arguments: object, about: str | None = None) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise _error(about)
    return result


def _error(about: str | None) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), *([about] if about else ()))
