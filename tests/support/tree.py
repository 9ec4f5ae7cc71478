"""An exact description of a file tree, and how two of them differ."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import fields, frozen

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@frozen
class Entry:
    """All that a layer says of one name; `mode` is octal text, `device` is major:minor.

    `same_inode` are all names of a file with several, `mtime_ns` is nanoseconds.
    """

    kind: str
    mode: str
    uid: int
    gid: int
    mtime_ns: int
    size: int | None = None
    sha256: str | None = None
    target: str | None = None
    device: str | None = None
    xattrs: Mapping[str, bytes] = {}
    same_inode: tuple[str, ...] = ()


Tree = dict[str, Entry]
_PROPERTIES = [attribute.name for attribute in fields(Entry)]


def describe(root: Path, passed_over: Callable[[Path], bool] = lambda path: False) -> Tree:
    """Everything below `root`, by its path from there; `.` is `root` itself.

    But for what is `passed_over`, which is no directory.

    Names that are no UTF-8 are decoded with surrogate escapes. Stays on no file system in
    particular: what is mounted below is described too.
    """
    paths = {".": root}
    for directory, subdirectories, files in os.walk(root, onerror=_fail):
        for name in subdirectories + files:
            path = Path(directory) / name
            if not passed_over(path):
                paths[str(path.relative_to(root))] = path
    found = {name: path.lstat() for name, path in paths.items()}
    inodes: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, status in found.items():
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            inodes[status.st_dev, status.st_ino].append(name)
    return {
        name: _entry(
            paths[name], status, tuple(sorted(inodes.get((status.st_dev, status.st_ino), ())))
        )
        for name, status in sorted(found.items())
    }


def differences(expected: Tree, actual: Tree) -> list[str]:
    """One line for each name or property in which `actual` is not `expected`; empty when equal."""
    lines = [f"{name!r}: missing" for name in expected if name not in actual]
    lines += [f"{name!r}: not expected, a {actual[name].kind}" for name in actual.keys() - expected]
    for name in expected.keys() & actual.keys():
        for prop in _PROPERTIES:
            want = getattr(expected[name], prop)
            have = getattr(actual[name], prop)
            if want != have:
                lines.append(f"{name!r}: {prop} is {_short(have)} and not {_short(want)}")
    return sorted(lines)


def _entry(path: Path, status: os.stat_result, same_inode: tuple[str, ...]) -> Entry:
    kind = stat.S_IFMT(status.st_mode)
    regular = kind == stat.S_IFREG
    device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    return Entry(
        kind=_KINDS[kind],
        mode=f"{stat.S_IMODE(status.st_mode):04o}",
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=status.st_size if regular else None,
        sha256=_sha256(path) if regular else None,
        target=str(path.readlink()) if kind == stat.S_IFLNK else None,
        device=f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if device else None,
        xattrs={
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        },
        same_inode=same_inode,
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fail(error: OSError) -> None:
    raise error
