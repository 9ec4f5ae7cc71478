"""Which hidden files a crash would leave behind, and their removal afterwards.

Most uploads have no name at all until they are whole. Those that must have one for a while note it
here first: a symbolic link, named for the file and the overlay, that says which directory it is in.
On the file system of the storage nothing is synced for that: a journal that orders its changes, as
ext4's does, has the note on the disk before the name, and removes it after the name.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from agent.files.guest_path import GuestPath, GuestRoot, closing

log = logging.getLogger(__name__)

UPLOAD = ".innkeep-upload-"
RESUME = ".innkeep-resume-"
KEPT_S = 24 * 60 * 60
"""How long what arrived of a resumable upload is kept after it was left, and a note of what is not
to be found."""

# What is said by a file system that is full, or takes no writes any more.
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


@attrs.frozen
class Note:
    """That a hidden file ``name`` may be in ``directory`` of the overlay ``workload``, or of the VM
    where that is None."""

    _link: Path
    name: str
    workload: str | None
    directory: GuestPath

    @property
    def is_resumable(self) -> bool:
        """Whether the file is to be kept for another attempt."""
        return self.name.startswith(RESUME)

    def erase(self) -> None:
        """Forget it: the file has its final name, or is gone."""
        try:
            self._link.unlink(missing_ok=True)
        except OSError as error:
            # It names nothing, and the next agent will see that.
            log.warning("erase the note of %s: %s", self.name, error.strerror)

    def renew(self) -> None:
        """Let the time that it is kept begin now. Raises OSError."""
        os.utime(self._link, follow_symlinks=False)

    def age_s(self) -> float:
        """How long ago its time began. Raises OSError."""
        age_s = time.time() - self._link.lstat().st_mtime
        # A note from the future is one of a clock that was wrong.
        return age_s if age_s > -KEPT_S else KEPT_S


class Journal:
    """The notes in a directory, which is made. Blocks, as all of its methods; raises OSError."""

    def __init__(self, directory: Path, otherwise: Path | None = None) -> None:
        """``otherwise`` is another journal's directory, for notes of the VM's own files that cannot
        be made in this one: such a file need not be where there is no room, or a failing disk."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._otherwise = otherwise
        self._left_behind = {each.name: each for each in self.notes() if not each.is_resumable}

    def notes(self) -> list[Note]:
        """All that are kept, those of uploads that still go on included."""
        found = []
        for link in self._directory.iterdir():
            name, _, workload = link.name.partition("@")
            with suppress(OSError):  # erased just now
                parts = tuple(part for part in str(link.readlink()).split("/") if part)
                found.append(Note(link, name, workload or None, GuestPath(parts)))
        return found

    def note(self, name: str, workload: str | None, directory: GuestPath) -> Note:
        """Make a note, before the file is made. One that is there already is taken."""
        link = self._directory / f"{name}@{workload or ''}"
        try:
            _make(link, directory)
        except OSError as error:
            if workload is not None or self._otherwise is None or error.errno not in _NO_PLACE:
                raise
            link = self._otherwise / link.name
            _make(link, directory)
        return Note(link, name, workload, directory)

    @contextmanager
    def hiding(self, workload: str | None, where: GuestPath, directory: int) -> Iterator[str]:
        """A name for a file in the open ``directory``, which is at ``where``.

        The file has left that name when the block ends well; else it is removed.
        """
        note = self.note(f"{UPLOAD}{secrets.token_hex(16)}", workload, where)
        try:
            yield note.name
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(note.name, dir_fd=directory)
            note.erase()
            raise
        note.erase()

    def left_behind(self, workload: str | None) -> list[Note]:
        """What earlier agents left behind there, and nobody could remove yet."""
        left = list(self._left_behind.values())
        return [note for note in left if note.workload == workload] if left else left

    def expires_in_s(self, note: Note) -> float:
        """In how many seconds the file of a note is not needed any more; 0 or less if it is not."""
        if note.name in self._left_behind:
            return 0
        if not note.is_resumable:
            return float("inf")
        try:
            return KEPT_S - note.age_s()
        except FileNotFoundError:  # erased just now
            return float("inf")

    def clean(self, root: GuestRoot, notes: Iterable[Note]) -> None:
        """Remove the files of notes that are below that root, and the notes.

        Where a directory is not to be found (no container runs that had it mounted), the note stays
        for the next time, and for a day at most.
        """
        for note in notes:
            if _remove(root, note) or note.age_s() >= KEPT_S:
                self.forget([note])

    def forget(self, notes: Iterable[Note]) -> None:
        """Erase notes whose files are gone."""
        for note in notes:
            self._left_behind.pop(note.name, None)
            note.erase()


def _make(link: Path, directory: GuestPath) -> None:
    with suppress(FileExistsError):
        link.symlink_to(str(directory))


def _remove(root: GuestRoot, note: Note) -> bool:
    """Remove the file of a note; whether it is gone.

    Only a regular file is removed, through no link, and none that is being written to.
    """
    try:
        directory = root.open_directory(note.directory)
    except OSError as error:
        log.info("remove %s in %s: %s", note.name, note.directory, error.strerror)
        return False
    with closing(directory):
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with closing(os.open(note.name, flags, dir_fd=directory)) as file:
                if stat.S_ISREG(os.fstat(file).st_mode):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(note.name, dir_fd=directory)
        except FileNotFoundError:
            pass
        except BlockingIOError:
            note.renew()
            return False
        except OSError as error:
            log.warning("remove %s in %s: %s", note.name, note.directory, error.strerror)
            return False
    return True
