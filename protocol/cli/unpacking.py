"""A tar stream from a machine that nobody has to trust, unpacked into a local directory."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Final

import attrs

_BLOCK: Final = 1024 * 1024
_KEPT_BITS: Final = 0o1777
_ALL_BITS: Final = 0o7777


class UnsafeEntry(Exception):
    """An entry that would have been written somewhere else; the text names it."""


@attrs.define
class Unpacking:
    """Where a stream goes, and how.

    Nothing is written outside ``directory``: no name leads out of it, and no symbolic link on the
    way is followed, whoever made it. Set-user-ID and set-group-ID are kept with the owners only.
    What was not unpacked is told to ``remark``, one line each.
    """

    directory: Path
    with_owners: bool
    remark: Callable[[str], None]
    _known: set[PurePosixPath] = attrs.field(factory=lambda: {PurePosixPath()})
    """Directories here that are no links, and stay none: nothing of ours removes one."""
    _times: list[tuple[Path, tarfile.TarInfo]] = attrs.field(factory=list)

    def unpack(self, stream: IO[bytes]) -> None:
        """Read the stream to its end; entry by entry, whatever there is.

        Raises:
            UnsafeEntry, OSError: naming the entry or the file; the rest is not unpacked.
            tarfile.TarError: it is no tar stream, or was cut short.
        """
        is_new = not self.directory.exists()
        if is_new:
            self.directory.mkdir()
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK) as archive:
            for member in archive:
                name = _inner(member.name)
                if name == PurePosixPath():
                    if is_new and member.isdir():
                        self._times.append((self.directory, member))
                    continue
                self._parents(name)
                self._make(archive, member, name)
                # It would keep them all, to find them again.
                archive.members = []  # type: ignore[attr-defined]
        # Now that nothing changes in them any more.
        for path, member in reversed(self._times):
            self._set_attributes(path, member)

    def _parents(self, name: PurePosixPath) -> None:
        for parent in reversed(name.parents):
            if parent in self._known:
                continue
            path = self.directory / parent
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                path.mkdir()
            else:
                if not stat.S_ISDIR(mode):
                    raise UnsafeEntry(f"{name}: {path} is no directory of the copy")
            self._known.add(parent)

    def _make(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: PurePosixPath) -> None:
        path = self.directory / name
        if member.isdir():
            self._make_directory(path, name, member)
            return
        if not (member.isreg() or member.issym() or member.islnk() or member.isfifo()):
            self.remark(f"{name}: not copied: it is a device")
            return
        if member.islnk():
            source = _inner(member.linkname)
            self._parents(source)
            if path != self.directory / source:
                path.unlink(missing_ok=True)
                os.link(self.directory / source, path, follow_symlinks=False)
            return
        path.unlink(missing_ok=True)
        if member.issym():
            path.symlink_to(member.linkname)
        elif member.isfifo():
            os.mkfifo(path)
        else:
            content = archive.extractfile(member)
            assert content is not None
            # For nobody else to read: its mode comes last.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
                shutil.copyfileobj(content, file, _BLOCK)
        self._set_attributes(path, member)

    def _make_directory(self, path: Path, name: PurePosixPath, member: tarfile.TarInfo) -> None:
        if not (path.is_dir() and not path.is_symlink()):
            # A file, or a link, even to a directory: what is behind that is not the copy's.
            path.unlink(missing_ok=True)
            path.mkdir(mode=0o700)
        self._known.add(name)
        self._times.append((path, member))

    def _set_attributes(self, path: Path, member: tarfile.TarInfo) -> None:
        if self.with_owners:
            os.chown(path, member.uid, member.gid, follow_symlinks=False)
        if not member.issym():
            path.chmod(member.mode & (_ALL_BITS if self.with_owners else _KEPT_BITS))
        when = _mtime_ns(member)
        os.utime(path, ns=(when, when), follow_symlinks=False)


def _inner(name: str) -> PurePosixPath:
    """A name of the stream, from its top. Raises UnsafeEntry."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UnsafeEntry(f"{name!r} leads out of the copy")
    return path


def _mtime_ns(member: tarfile.TarInfo) -> int:
    """To the nanosecond, where the stream says it so."""
    whole, _, fraction = member.pax_headers.get("mtime", "").partition(".")
    if whole.isascii() and whole.isdecimal() and (fraction or "0").isdecimal():
        return int(whole) * 10**9 + int(f"{fraction:0<9}"[:9])
    return round(member.mtime * 10**9)
