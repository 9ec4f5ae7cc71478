"""One entry of a directory, copied with all that it is: a layer's, as overlayfs would show it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

# What overlayfs keeps for itself, as root and in a user namespace (`userxattr`):
# https://docs.kernel.org/filesystems/overlayfs.html
OVERLAY_PREFIXES = ("trusted.overlay.", "user.overlay.")
_ESCAPED = "overlay."

_STEP = 8 << 20
_SOURCE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TARGET = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

FileOrPath = int | str


def copy_entry(
    source_dir: int,
    name: str,
    status: os.stat_result,
    target_dir: int,
    check_cancelled: Callable[[], None],
) -> None:
    """Copy anything but a directory from one directory (a descriptor) to another.

    Contents with their holes, owner, mode, times, extended attributes; overlayfs's own are left
    out. ``status`` is the entry's; ``check_cancelled`` is called now and then, and may raise.
    Blocks.

    Raises:
        OSError: it cannot be read, or not be made; or it is half of a file (`metacopy`).
    """
    if stat.S_ISREG(status.st_mode):
        source = os.open(name, _SOURCE, dir_fd=source_dir)
        try:
            target = os.open(name, _TARGET, 0o600, dir_fd=target_dir)
            try:
                _copy_contents(source, target, check_cancelled)
                copy_attributes(source, status, target)
                os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
            finally:
                os.close(target)
        finally:
            os.close(source)
        return
    # What is no file cannot be opened to be looked at: by a path that leads through nothing.
    target_path = f"/proc/self/fd/{target_dir}/{name}"
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source_dir), name, dir_fd=target_dir)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target_dir)
    copy_attributes(f"/proc/self/fd/{source_dir}/{name}", status, target_path)
    os.utime(
        name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target_dir, follow_symlinks=False
    )


def copy_attributes(source: FileOrPath, status: os.stat_result, target: FileOrPath) -> None:
    """Owner, mode and extended attributes; times are to be set when nothing else will change.

    Raises:
        OSError: EOPNOTSUPP among others, where the target's file system has no such attributes.
    """
    follow = isinstance(source, int)
    # In this order: chown takes setuid bits and capabilities away.
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=follow)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))  # noqa: PTH101 (a descriptor or a path)
    for name in overlay_aware_names(source):
        kept = _unescaped(name)
        if kept is not None:
            value = os.getxattr(source, name, follow_symlinks=follow)
            os.setxattr(target, kept, value, follow_symlinks=follow)


def overlay_aware_names(source: FileOrPath) -> list[str]:
    """The names of an entry's extended attributes; none where the file system has none.

    Raises:
        OSError: EUCLEAN where one says that the entry's contents are elsewhere: a layer by itself
            does not tell where.
    """
    try:
        names = os.listxattr(source, follow_symlinks=isinstance(source, int))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return []
    for prefix in OVERLAY_PREFIXES:
        for elsewhere in ("redirect", "metacopy"):
            if prefix + elsewhere in names:
                raise OSError(
                    errno.EUCLEAN, f"it has overlayfs's {elsewhere}, which is of no use here"
                )
    return names


def _unescaped(name: str) -> str | None:
    """What an attribute is called above; None for those of overlayfs itself."""
    for prefix in OVERLAY_PREFIXES:
        if name.startswith(prefix + _ESCAPED):
            # Of an overlay inside this one.
            return prefix + name.removeprefix(prefix + _ESCAPED)
        if name.startswith(prefix):
            return None
    return name


def _copy_contents(source: int, target: int, check_cancelled: Callable[[], None]) -> None:
    size = os.fstat(source).st_size
    position = 0
    while position < size:
        check_cancelled()
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # there is nothing but a hole
        end = os.lseek(source, position, os.SEEK_HOLE)
        os.lseek(target, position, os.SEEK_SET)
        while position < end:
            check_cancelled()
            copied = os.sendfile(target, source, position, min(end - position, _STEP))
            if not copied:
                break  # it has become shorter
            position += copied
    os.ftruncate(target, size)
