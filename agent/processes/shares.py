"""Directories of the host, or of the VM, that a request wants in a container."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import attrs

from agent.errors import AgentError, cause_of
from agent.linux.mount import (
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    closing,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
)
from agent.processes.command import Bind
from protocol.errors import ErrorCode
from protocol.values import Mount

log = logging.getLogger(__name__)

VIRTIOFS = Path("/mnt/virtiofs")

_NO_SHARE = (
    "the VM has no virtiofs share of that tag; boot it with one, or name a directory of the VM by "
    "its absolute path"
)


@attrs.frozen
class Shares:
    """virtiofs shares, each mounted once in the VM, at ``directory``/tag."""

    directory: Path = VIRTIOFS
    at_boot: tuple[Mount, ...] = ()
    """What the VM itself has mounted, and with it every container that has nothing else there."""
    _turn: threading.Lock = attrs.field(factory=threading.Lock, eq=False)

    def binds(self, wanted: Iterable[Mount]) -> list[Bind]:
        """What is to be bound into a container, outer directories before those within them; as
        ``bind``, and MOUNT_FAILED also where two have one path. What is mounted at boot is among
        it, unless it gives way to something wanted."""
        binds: dict[str, Bind] = {}
        for each in wanted:
            bind = self.bind(each)
            if binds.setdefault(bind.destination, bind) != bind:
                raise _failed(each, "another mount of the request has that path")
        found = list(binds.values())
        for each in self.at_boot:
            bind = attrs.evolve(self.bind(each), gives_way=True)
            if not bind.is_displaced_by(binds.values()):
                found.append(bind)
        return sorted(found, key=lambda bind: bind.destination.count("/"))

    def mount_at_boot(self) -> None:
        """Have what is to be mounted in the VM at its place there; an agent that died since may
        have done it. What fails is logged, and an error of each request that is to have it. Blocks.
        """
        for each in self.at_boot:
            try:
                self.mount_in_vm(each)
            except AgentError as error:
                log.error("%s", error.message)

    def mount_in_vm(self, wanted: Mount) -> Path:
        """Have a share at its path in the VM; where it is mounted whole. Blocks.

        Raises:
            AgentError: MOUNT_FAILED, as ``bind``.
        """
        try:
            bind = self.bind(wanted)
            _mount_in_vm(bind)
        except OSError as error:
            raise _failed(wanted, cause_of(error)) from error
        return Path(bind.source)

    def claiming(self, place: Path) -> Path | None:
        """The share that is mounted there at boot, if one is."""
        return next(
            (self._place(each.tag) for each in self.at_boot if Path(each.path) == place), None
        )

    def bind(self, wanted: Mount) -> Bind:
        """What is to be bound into a container; the share is mounted where it is not yet. Blocks.

        A tag that is an absolute path names a directory of the VM.

        Raises:
            AgentError: MOUNT_FAILED: no such share or directory, or a path that cannot be one.
        """
        destination = _destination(wanted)
        try:
            source = Path(wanted.tag) if wanted.tag.startswith("/") else self._mounted(wanted.tag)
            if not source.is_dir():
                raise OSError(*_error(errno.ENOTDIR if source.exists() else errno.ENOENT))
        except OSError as error:
            # Without the file, whose name the host has given: it may be as long as it likes.
            raise _failed(wanted, error.strerror or "") from error
        except ValueError as error:
            raise _failed(wanted, str(error)) from error
        return Bind(str(source), destination, wanted.read_only)

    def _place(self, tag: str) -> Path:
        return Path(tag) if tag.startswith("/") else self.directory / tag

    def _mounted(self, tag: str) -> Path:
        if not tag or "/" in tag or "\0" in tag or tag in (".", ".."):
            raise ValueError("expected a virtiofs tag or an absolute path")
        where = self._place(tag)
        with self._turn:
            if not where.is_mount():
                where.mkdir(parents=True, exist_ok=True)
                try:
                    mount(tag, where, fstype="virtiofs")
                except OSError as error:
                    where.rmdir()
                    # The kernel has no share of that tag, or no virtiofs at all.
                    if error.errno in (errno.EINVAL, errno.ENODEV):
                        raise ValueError(_NO_SHARE) from error
                    raise
        return where


def _mount_in_vm(bind: Bind) -> None:
    place = Path(bind.destination)
    place.mkdir(parents=True, exist_ok=True)
    if place.samefile(bind.source):
        return
    with closing(open_tree(bind.source)) as tree:
        attributes = MOUNT_ATTR_RDONLY if bind.read_only else 0
        mount_setattr(tree, set_attributes=attributes, propagation=MS_PRIVATE)
        move_mount(tree, place)


def _destination(wanted: Mount) -> str:
    path = PurePosixPath(wanted.path)
    if not path.is_absolute() or ".." in path.parts or "\0" in wanted.path or len(path.parts) < 2:
        raise _failed(wanted, "expected an absolute path in the container, without ..")
    return f"/{'/'.join(path.parts[1:])}"


def _error(number: int) -> tuple[int, str]:
    return number, os.strerror(number)


def _failed(wanted: Mount, cause: str) -> AgentError:
    return AgentError(
        ErrorCode.MOUNT_FAILED, f"mount {wanted.tag[:200]!r} at {wanted.path[:200]!r}: {cause}"
    )
