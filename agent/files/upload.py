"""A file that comes in: written aside, checked, and put in its place whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat

import attrs

from agent.errors import AgentError
from agent.files.failure import failing_on
from agent.files.guest_path import KINDS, GuestPath, Owner, closing
from agent.files.journal import RESUME
from agent.files.quota import within_quotas
from agent.files.temporary import Hidden, Nameless, Site
from protocol.constants import FILE_TRANSFER_MAX_TOTAL
from protocol.errors import ErrorCode

DEFAULT_MODE = 0o644

_MODE_BITS = 0o7777
_SHA256 = re.compile("[0-9a-f]{64}")
_SECOND_NS = 1_000_000_000
_REHASHED_BYTES = 1024 * 1024


@attrs.frozen(kw_only=True)
class Plan:
    """What is to be written where; ``sha256`` is what its content must have."""

    path: GuestPath
    size: int
    mode: int
    owner: Owner
    sha256: str | None = None
    has_digest: bool = False
    """Whether the digest is asked for."""
    is_resumable: bool = False
    mtime_ns: int | None = None
    """When it was modified, since 1970; None for when it is written."""

    @classmethod
    def of(
        cls,
        path: str,
        size: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        sha256: str | None = None,
        digest: bool = False,
        resume: bool = False,
        mtime_s: int | None = None,
        mtime_ns: int | None = None,
    ) -> Plan:
        """What a request asks for; of ``mode`` the permission bits count.

        Raises:
            AgentError: INVALID_REQUEST.
        """
        target = GuestPath.of_file(path)
        if size > FILE_TRANSFER_MAX_TOTAL:
            raise AgentError(
                ErrorCode.INVALID_REQUEST,
                f"total_size: {size} bytes for {target}, at most {FILE_TRANSFER_MAX_TOTAL} "
                "are allowed",
            )
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise AgentError(
                ErrorCode.INVALID_REQUEST, "sha256: expected 64 hexadecimal digits in lower case"
            )
        if resume and sha256 is None:
            raise AgentError(
                ErrorCode.INVALID_REQUEST, "resume: needs sha256, to tell one upload from another"
            )
        return cls(
            path=target,
            size=size,
            mode=DEFAULT_MODE if mode is None else mode & _MODE_BITS,
            owner=Owner.of(uid, gid),
            sha256=sha256,
            has_digest=digest,
            is_resumable=resume,
            mtime_ns=_since_1970(mtime_s, mtime_ns),
        )

    @property
    def partial_name(self) -> str:
        """The hidden name of what has arrived of it."""
        identity = f"{self.path}\0{self.size}\0{self.sha256}"
        return RESUME + hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()


@attrs.frozen
class Written:
    """What was written: its length in bytes, and its digest where that is known."""

    size: int
    sha256: str | None


class Upload:
    """One file on its way in. Made by ``begin``; whoever began it closes it.

    All methods block, and are for one thread at a time. They raise AgentError: FILE_IO_FAILED, or
    INVALID_REQUEST where the host is to blame. Then nothing but ``close`` may follow.
    """

    def __init__(
        self, plan: Plan, site: Site, directory: int, temporary: Nameless | Hidden
    ) -> None:
        self._plan = plan
        self._site = site
        self._directory = directory
        self._temporary = temporary
        self._is_placed = False
        self._is_void = False
        """Whether what has arrived is of no use for another attempt."""
        needs_digest = plan.has_digest or plan.sha256 is not None
        self._sha256 = hashlib.sha256() if needs_digest else None
        self.received = 0
        """Bytes that are there already."""

    @classmethod
    def begin(cls, plan: Plan, site: Site) -> Upload:
        """Make room for it: nothing that anybody sees, but for an upload to be resumed."""
        with failing_on("write", plan.path), within_quotas():
            if plan.is_resumable:
                directory, _ = site.root.make_directory(plan.path.parent, plan.owner)
            else:
                directory, _ = site.root.open_nearest_directory(plan.path.parent)
            try:
                _refuse_special(directory, plan.path.name)
                temporary = _temporary(plan, site, directory)
                upload = cls(plan, site, directory, temporary)
            except BaseException:
                os.close(directory)
                raise
            try:
                upload._prepare()
            except BaseException:
                upload.close()
                raise
        return upload

    def write(self, data: bytes) -> None:
        """Add the next bytes, none of which is beyond the size that was announced."""
        with failing_on("write", self._plan.path), within_quotas():
            left = memoryview(data)
            while left:
                left = left[os.write(self._temporary.file, left) :]
        if self._sha256 is not None:
            self._sha256.update(data)
        self.received += len(data)

    def flush(self) -> None:
        """Have what was written until now on the disk, beside writing further."""
        with failing_on("write", self._plan.path):
            os.fdatasync(self._temporary.file)

    def finish(self) -> Written:
        """Check it, and put it where it belongs, on the disk: all of it or nothing."""
        plan = self._plan
        digest = None if self._sha256 is None else self._sha256.hexdigest()
        if self.received != plan.size:
            self._is_void = True
            raise AgentError(
                ErrorCode.INVALID_REQUEST,
                f"write {plan.path}: {self.received} bytes came, {plan.size} were announced",
            )
        if plan.sha256 not in (None, digest):
            self._is_void = True
            raise AgentError(
                ErrorCode.FILE_IO_FAILED,
                f"write {plan.path}: what came has the sha256 {digest}, not {plan.sha256}",
            )
        with failing_on("write", plan.path), within_quotas():
            file = self._temporary.file
            plan.owner.own(file)
            os.fchmod(file, plan.mode)
            if plan.mtime_ns is not None:
                os.utime(file, ns=(plan.mtime_ns, plan.mtime_ns))
            os.fsync(file)
            directory, made = self._site.root.make_directory(plan.path.parent, plan.owner)
            with closing(directory):
                try:
                    _refuse_special(directory, plan.path.name)
                    self._temporary.place(directory, plan.path.name)
                except BaseException:
                    self._site.root.remove_directories(made)
                    raise
                self._is_placed = True
                _sync(directory)
        return Written(plan.size, digest)

    def overrun(self, size: int) -> AgentError:
        """What to say of a chunk that is ``size`` bytes long, and too long; it ends the upload."""
        self._is_void = True
        return AgentError(
            ErrorCode.INVALID_REQUEST,
            f"write {self._plan.path}: at least {size} bytes came, {self._plan.size} were "
            "announced",
        )

    def close(self) -> None:
        """End it. What has arrived of one that was not finished is gone, unless it can be
        resumed. Raises nothing."""
        if not self._is_placed:
            if (
                isinstance(self._temporary, Hidden)
                and self._plan.is_resumable
                and not self._is_void
            ):
                self._temporary.keep()
            else:
                self._temporary.remove()
        os.close(self._temporary.file)
        os.close(self._directory)

    def _prepare(self) -> None:
        file = self._temporary.file
        if isinstance(self._temporary, Nameless):
            # Its owner's quota is charged from the first byte on; one that has a name could be
            # written to by its owner.
            self._plan.owner.own(file)
        if self._plan.is_resumable and self._sha256 is not None:
            if os.fstat(file).st_size > self._plan.size:
                os.ftruncate(file, 0)
            while block := os.read(file, _REHASHED_BYTES):
                self._sha256.update(block)
                self.received += len(block)
        _refuse_without_room(self._directory, self._plan.size - self.received)


def _since_1970(seconds: int | None, nanoseconds: int | None) -> int | None:
    """A time as a request gives it, in nanoseconds. Raises AgentError: INVALID_REQUEST."""
    if seconds is None and nanoseconds is None:
        return None
    if seconds is None:
        raise AgentError(ErrorCode.INVALID_REQUEST, "mtime_ns: needs mtime_s beside it")
    beside = nanoseconds or 0
    if beside >= _SECOND_NS:
        raise AgentError(
            ErrorCode.INVALID_REQUEST, f"mtime_ns: expected 0 to {_SECOND_NS - 1}, got {beside}"
        )
    return seconds * _SECOND_NS + beside


def _temporary(plan: Plan, site: Site, directory: int) -> Nameless | Hidden:
    if plan.is_resumable:
        return Hidden.resume(site, directory, plan.partial_name)
    return Nameless.make(site, directory) or Hidden.make(site, directory)


def _refuse_special(directory: int, name: str) -> None:
    """Raise for what a file must not take the place of."""
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise OSError(errno.EINVAL, f"it is {KINDS[stat.S_IFMT(mode)]}, no regular file")


def _refuse_without_room(directory: int, size: int) -> None:
    there = os.fstatvfs(directory)
    free = there.f_bavail * there.f_frsize
    # File systems that count nothing have no blocks.
    if there.f_blocks and size > free:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size} bytes are needed, {free} are free"
        )


def _sync(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # its file system has nothing to sync
            raise
