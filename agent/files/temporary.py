"""A file that is being written and is not seen under its name before it is whole.

Three kinds. Where the file system can, it has no name at all (O_TMPFILE), and the kernel removes it
with its last descriptor, after a crash and a loss of power too. Elsewhere, and where it is to be
resumed, it has a hidden name, which the journal knows.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from contextlib import suppress
from typing import Protocol

import attrs

from agent.files.guest_path import GuestRoot
from agent.files.journal import UPLOAD, Journal, Note
from agent.linux.linkat import linkat

# What kernels and file systems say who have no O_TMPFILE (open(2)); a directory is what one that
# does not know the flag takes it for.
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS}


@attrs.frozen
class Site:
    """Where files are written: a root, the overlay that it is of or None, and the journal."""

    root: GuestRoot
    workload: str | None
    journal: Journal


class Temporary(Protocol):
    """A file on its way. Blocks, as all methods; raises OSError."""

    file: int
    """Open for reading and writing; closed by the file's owner."""

    def place(self, directory: int, name: str) -> None:
        """Give it its final name in an open directory of the same mount, over what is there."""

    def remove(self) -> None:
        """Let it be gone. Raises nothing."""


@attrs.define
class Nameless:
    """One that has no name."""

    file: int
    _site: Site

    @classmethod
    def make(cls, site: Site, directory: int) -> Nameless | None:
        """One in a directory's file system, or None: it knows no such thing."""
        try:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            return cls(os.open(".", flags, 0o600, dir_fd=directory), site)
        except OSError as error:
            if error.errno in _NO_TMPFILE:
                return None
            raise

    def place(self, directory: int, name: str) -> None:
        try:
            linkat(self.file, directory, name)
        except FileExistsError:
            # There is no call that links over a name.
            where = self._site.root.path_of(directory)
            with self._site.journal.hiding(self._site.workload, where, directory) as hidden:
                linkat(self.file, directory, hidden)
                os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)

    def remove(self) -> None:
        pass


@attrs.define
class Hidden:
    """One with a hidden name in an open directory, which stays open longer."""

    file: int
    _directory: int
    _note: Note

    @classmethod
    def make(cls, site: Site, directory: int) -> Hidden:
        """A fresh one."""
        name = f"{UPLOAD}{secrets.token_hex(16)}"
        note = site.journal.note(name, site.workload, site.root.path_of(directory))
        try:
            return cls(_create(directory, name), directory, note)
        except BaseException:
            note.erase()
            raise

    @classmethod
    def resume(cls, site: Site, directory: int, name: str) -> Hidden:
        """The one that earlier attempts left under that name, or a fresh one; for us alone.

        Raises:
            OSError: EBUSY, while another upload of it goes on; EPERM, for what no upload has made.
        """
        note = site.journal.note(name, site.workload, site.root.path_of(directory))
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        while True:
            try:
                file = os.open(name, flags, dir_fd=directory)
            except FileNotFoundError:
                with suppress(FileExistsError):
                    os.close(_create(directory, name))
                continue
            try:
                if _is_ours(file, directory, name):
                    note.renew()
                    return cls(file, directory, note)
            except BaseException:
                os.close(file)
                raise
            # The one who had it was done with it just now.
            os.close(file)

    def place(self, directory: int, name: str) -> None:
        os.rename(self._note.name, name, src_dir_fd=self._directory, dst_dir_fd=directory)
        self._note.erase()

    def remove(self) -> None:
        with suppress(OSError):
            os.unlink(self._note.name, dir_fd=self._directory)
            self._note.erase()

    def keep(self) -> None:
        """Leave it to the next attempt. Raises nothing."""
        with suppress(OSError):
            self._note.renew()


def _create(directory: int, name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=directory)


def _is_ours(file: int, directory: int, name: str) -> bool:
    """Whether an open file is now locked by us and has still that name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another connection is sending the same upload") from None
    found = os.fstat(file)
    # It is going to be written to and given away.
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "something else has the name of what arrived of it before")
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, there)
