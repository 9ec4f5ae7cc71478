"""What hosts do with files besides their contents: look at them, list, make and remove them."""

from __future__ import annotations

import errno
import heapq
import os
import stat
from collections.abc import Callable
from contextlib import suppress

import attrs

from agent.files.failure import failing_on
from agent.files.guest_path import GuestPath, GuestRoot, Owner, closing
from agent.files.quota import within_quotas
from protocol.errors import ErrorCode
from protocol.values import FileEntry, FileInfo

MOST_ENTRIES = 10_000
# Names and targets may be long: an answer must fit a frame, escaped and written as JSON.
_MOST_CHARACTERS = 4 * 1024 * 1024

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "block",
    stat.S_IFCHR: "char",
}


@attrs.frozen
class Listing:
    """Some of a directory's entries, and whether there are more behind them."""

    entries: list[FileEntry]
    more: bool


def describe(root: GuestRoot, path: GuestPath, *, follow: bool) -> FileInfo:
    """What is at a path: a symbolic link at its end itself, unless ``follow``. Blocks.

    Raises:
        AgentError: FILE_IO_FAILED.
    """
    flags = os.O_PATH
    if path.names_directory:
        flags |= os.O_DIRECTORY
    elif not follow:
        flags |= os.O_NOFOLLOW
    with (
        failing_on("look at", path, missing=ErrorCode.NOT_FOUND),
        closing(root.open(path, flags)) as found,
    ):
        return _info(os.fstat(found), lambda: os.readlink("", dir_fd=found))


def listed(root: GuestRoot, path: GuestPath, *, after: str | None, limit: int) -> Listing:
    """The first ``limit`` entries of a directory behind the name ``after``, ordered. Blocks.

    Raises:
        AgentError: FILE_IO_FAILED.
    """
    with (
        failing_on("list", path, missing=ErrorCode.NOT_FOUND),
        closing(root.open_directory(path)) as directory,
    ):
        with os.scandir(directory) as entries:
            names = ((_readable(entry.name), entry.name) for entry in entries)
            behind = (name for name in names if after is None or name[0] > after)
            chosen = heapq.nsmallest(limit + 1, behind)
        found: list[FileEntry] = []
        characters = 0
        for shown, name in chosen[:limit]:
            if characters > _MOST_CHARACTERS:
                return Listing(found, more=True)
            with suppress(FileNotFoundError):  # removed just now
                entry = _entry(directory, name)
                found.append(entry)
                characters += len(shown) + len(entry.target or "")
        return Listing(found, more=len(chosen) > limit)


def make_directory(root: GuestRoot, path: GuestPath, owner: Owner, mode: int) -> bool:
    """Make a directory and its missing parents; whether it was not there yet. Blocks.

    Raises:
        AgentError: FILE_IO_FAILED.
    """
    with failing_on("make", path), within_quotas():
        directory, made = root.make_directory(path, owner, mode)
        os.close(directory)
        return bool(made)


def remove(
    root: GuestRoot,
    path: GuestPath,
    *,
    missing_ok: bool,
    remove_tree: Callable[[int, str], None] | None,
) -> None:
    """Remove a file, a link or an empty directory. Blocks.

    ``remove_tree`` removes, from an open directory, one of that name with all that is in it; None
    refuses those that are not empty.

    Raises:
        AgentError: FILE_IO_FAILED.
    """
    with failing_on("remove", path, missing=ErrorCode.NOT_FOUND):
        try:
            parent = root.open_directory(path.parent)
        except FileNotFoundError:
            if missing_ok:
                return
            raise
        with closing(parent):
            try:
                found = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
                if not stat.S_ISDIR(found.st_mode):
                    if path.names_directory:
                        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                    os.unlink(path.name, dir_fd=parent)
                elif remove_tree is None:
                    os.rmdir(path.name, dir_fd=parent)
                else:
                    remove_tree(parent, path.name)
            except FileNotFoundError:
                if missing_ok:
                    return
                raise
            os.fsync(parent)


def _entry(directory: int, name: str) -> FileEntry:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    info = _info(found, lambda: os.readlink(name, dir_fd=directory))
    shown = _readable(name)
    facts = attrs.asdict(info) | {"escaped": info.escaped or shown != name}
    return FileEntry(name=shown, **facts)


def _info(found: os.stat_result, read_target: Callable[[], str]) -> FileInfo:
    seconds, nanoseconds = divmod(found.st_mtime_ns, 1_000_000_000)
    target = read_target() if stat.S_ISLNK(found.st_mode) else None
    shown = None if target is None else _readable(target)
    return FileInfo(
        kind=_KINDS[stat.S_IFMT(found.st_mode)],
        size=found.st_size,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        mtime_s=seconds,
        mtime_ns=nanoseconds,
        target=shown,
        escaped=shown != target,
    )


def _readable(name: str) -> str:
    """The name with bytes that are not UTF-8 as ``\\xNN``, which are surrogates here (PEP 383)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
