"""Paths as hosts write them, and the root that they resolve in and are never led out of."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from agent.errors import AgentError
from agent.linux.openat2 import (
    RESOLVE_BENEATH,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    openat2,
)
from protocol.errors import ErrorCode

# A workload that renames directories without pause can make each single attempt fail.
_ATTEMPTS = 1000

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_NO_ID = 2**32 - 1  # chown(2) takes it for "as it is"


@attrs.frozen
class GuestPath:
    """A path from the root that applies, without ``..``; str() writes it with its leading slash."""

    parts: tuple[str, ...]
    names_directory: bool = False
    """Whether it was written with a slash at its end."""

    @classmethod
    def parse(cls, text: str) -> GuestPath:
        """The path that a host means; one without a leading slash is taken from the root.

        Raises:
            AgentError: INVALID_REQUEST: it is empty, or holds a NUL or a component ``..``.
        """
        if not text:
            raise _invalid("it is empty")
        if "\0" in text:
            raise _invalid("it holds a NUL byte")
        components = text.split("/")
        if ".." in components:
            raise _invalid(f"{text[:200]!r} has a component '..'; say where that is instead")
        parts = tuple(part for part in components if part not in ("", "."))
        return cls(parts, names_directory=components[-1] in ("", ".") and bool(parts))

    @classmethod
    def of_file(cls, text: str) -> GuestPath:
        """As ``parse``, for what can only be a file.

        Raises:
            AgentError: INVALID_REQUEST, also for the root and for a path that ends in a slash.
        """
        path = cls.parse(text)
        if not path.parts or path.names_directory:
            raise _invalid(f"{text[:200]!r} names a directory, not a file")
        return path

    @property
    def name(self) -> str:
        """The last component. Raises IndexError for the root."""
        return self.parts[-1]

    @property
    def parent(self) -> GuestPath:
        """The directory that it lies in; the root's is the root."""
        return GuestPath(self.parts[:-1])

    def __truediv__(self, name: str) -> GuestPath:
        return GuestPath((*self.parts, name))

    def __str__(self) -> str:
        return "/" + "/".join(self.parts)


@attrs.frozen
class Owner:
    """Whose a new file is; None leaves what the kernel gives it: the agent's, or its directory's
    group where that is set-group-ID."""

    uid: int | None = None
    gid: int | None = None

    @classmethod
    def of(cls, uid: int | None, gid: int | None) -> Owner:
        """The owner that a request asks for.

        Raises:
            AgentError: INVALID_REQUEST for 4294967295, which no file can have.
        """
        for name, value in (("uid", uid), ("gid", gid)):
            if value == _NO_ID:
                raise AgentError(ErrorCode.INVALID_REQUEST, f"{name}: {value} is no one's")
        return cls(uid, gid)

    def own(self, descriptor: int) -> None:
        """Give an open file to this owner, before its mode is set: a change clears set-user-ID.

        Raises:
            OSError: what the kernel says.
        """
        if self.uid is not None or self.gid is not None:
            os.fchown(
                descriptor,
                -1 if self.uid is None else self.uid,
                -1 if self.gid is None else self.gid,
            )


@attrs.frozen
class GuestRoot:
    """A directory that is the root of paths: symbolic links, absolute ones too, stay inside.

    Resolving and opening are one step, openat2(2) with RESOLVE_IN_ROOT, whatever is renamed
    meanwhile. All methods block and raise OSError; descriptors are the caller's to close.
    """

    descriptor: int
    """Of the directory itself; O_PATH is enough."""
    namespace: int | None = None
    """Of the mount namespace that it is in, where that is not the agent's own."""

    @classmethod
    @contextmanager
    def opened(cls, directory: str | os.PathLike[str]) -> Iterator[GuestRoot]:
        """The directory as a root, for the block."""
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield cls(descriptor)
        finally:
            os.close(descriptor)

    def open(self, path: GuestPath, flags: int, mode: int = 0) -> int:
        """A descriptor of what is at ``path``, for open(2)'s ``flags``, close-on-exec.

        With O_NOFOLLOW and O_PATH a symbolic link at the end is opened itself. Devices and
        fifos are acted on by being opened: O_PATH, or ``open_regular``, for what may be one.

        Raises:
            OSError: ELOOP for a link of /proc that is no path; EAGAIN where the workload renames
                directories faster than they can be walked.
        """
        text = "/".join(path.parts) or "."
        resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
        for _ in range(_ATTEMPTS):
            with suppress(BlockingIOError, InterruptedError):
                return openat2(self.descriptor, text, flags, mode, resolve)
        return openat2(self.descriptor, text, flags, mode, resolve)

    def open_directory(self, path: GuestPath) -> int:
        """The directory at ``path``, to list, to sync and to name things in."""
        return self.open(path, _DIRECTORY)

    def open_regular(self, path: GuestPath) -> int:
        """The regular file at ``path``, to read.

        Nothing else is opened, so no device is acted on and no fifo waited for. Reads of what
        would have to wait (/proc/kmsg) are EAGAIN.

        Raises:
            IsADirectoryError: it is one.
            OSError: EINVAL, in words, for what is no regular file.
        """
        found = self.open(path, os.O_PATH)
        try:
            mode = os.fstat(found).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, f"it is {KINDS[stat.S_IFMT(mode)]}, no regular file")
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{found}", flags)
        finally:
            os.close(found)

    def path_of(self, directory: int) -> GuestPath:
        """Where an open directory is now, without symbolic links."""
        here = _path_of(self.descriptor)
        there = _path_of(directory)
        inside = there.removeprefix("" if here == "/" else here)
        return GuestPath(tuple(part for part in inside.split("/") if part))

    def open_nearest_directory(self, path: GuestPath) -> tuple[int, tuple[str, ...]]:
        """The deepest directory towards ``path`` that is there, and the names still to be made."""
        for depth in range(len(path.parts), -1, -1):
            try:
                found = self.open_directory(GuestPath(path.parts[:depth]))
            except FileNotFoundError:
                if depth == 0:
                    raise
            else:
                return found, path.parts[depth:]
        raise AssertionError("the root has no parent")

    def make_directory(
        self, path: GuestPath, owner: Owner, mode: int = 0o755
    ) -> tuple[int, tuple[GuestPath, ...]]:
        """The directory at ``path``, made with its missing parents; and which were made, in order.

        Each is the owner's. ``mode`` is that of the last one, the parents have 0755; whatever the
        umask, and in a set-group-ID directory set-group-ID as well. Their names are on the disk
        afterwards. What fails leaves none of them.

        Raises:
            OSError: ENOENT, too, for a link that leads nowhere.
        """
        made: list[GuestPath] = []
        try:
            for _ in range(_ATTEMPTS):
                directory, missing = self.open_nearest_directory(path)
                try:
                    for left in range(len(missing), 0, -1):
                        here = GuestPath(path.parts[: len(path.parts) - left + 1])
                        child = _make_in(directory, here.name, owner, mode if left == 1 else 0o755)
                        made.append(here)
                        os.close(directory)
                        directory = child
                    return directory, tuple(made)
                except FileExistsError:
                    # Somebody was faster, unless it is a link that leads nowhere.
                    os.close(directory)
                    self._refuse_dangling(here)
                except BaseException:
                    os.close(directory)
                    raise
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except BaseException:
            self.remove_directories(made)
            raise

    def remove_directories(self, made: Sequence[GuestPath]) -> None:
        """Remove directories that were made for nothing, the last one first, as far as they are
        empty. Raises nothing."""
        for path in reversed(made):
            with suppress(OSError), closing(self.open_directory(path.parent)) as parent:
                os.rmdir(path.name, dir_fd=parent)

    def _refuse_dangling(self, path: GuestPath) -> None:
        with closing(self.open(path, os.O_PATH | os.O_NOFOLLOW)) as found:
            if not stat.S_ISLNK(os.fstat(found).st_mode):
                return
        try:
            os.close(self.open(path, os.O_PATH))
        except FileNotFoundError:
            reason = f"the symbolic link {path} leads nowhere"
            raise FileNotFoundError(errno.ENOENT, reason) from None


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


def _make_in(directory: int, name: str, owner: Owner, mode: int) -> int:
    """Make one directory, and open it; what fails leaves none."""
    os.mkdir(name, 0o700, dir_fd=directory)
    try:
        # Unless somebody has put something else in its place.
        resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
        made = openat2(directory, name, _DIRECTORY, resolve=resolve)
        try:
            owner.own(made)
            inherited = os.fstat(made).st_mode & stat.S_ISGID
            os.fchmod(made, mode | inherited)
            os.fsync(directory)
        except BaseException:
            os.close(made)
            raise
    except BaseException:
        with suppress(OSError):
            os.rmdir(name, dir_fd=directory)
        raise
    return made


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _invalid(reason: str) -> AgentError:
    return AgentError(ErrorCode.INVALID_REQUEST, f"path: {reason}")
