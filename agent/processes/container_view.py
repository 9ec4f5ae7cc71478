"""A container's files as its command will see them, looked at before there is a container."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import attrs

from agent.errors import failing_as
from agent.processes.command import Bind
from agent.processes.executable import Opener
from agent.processes.rootfs import Rootfs
from protocol.errors import ErrorCode


@attrs.frozen
class ContainerView:
    """The root, and over it what is bound; made by ``of_binds``."""

    root: Rootfs
    _bound: Sequence[tuple[str, Rootfs]]

    @classmethod
    def of_binds(cls, stack: ExitStack, root: Path, binds: Sequence[Bind]) -> ContainerView:
        """The view for as long as ``stack``; raises OSError."""
        bound = [
            (bind.destination, stack.enter_context(Rootfs.opened(Path(bind.source))))
            for bind in sorted(binds, key=lambda bind: len(bind.destination), reverse=True)
            if Path(bind.source).is_dir()
        ]
        return cls(stack.enter_context(Rootfs.opened(root)), bound)

    @property
    def open(self) -> Opener:
        """What opens a path of the container: a descriptor that the caller closes."""
        return self._open

    def check_places(self, binds: Sequence[Bind]) -> None:
        """Raise MOUNT_FAILED where a directory is to be at the place of something else."""
        for bind in binds:
            if Path(bind.source).is_dir():
                with failing_as(ErrorCode.MOUNT_FAILED, bind.mounting), suppress(FileNotFoundError):
                    descriptor = self._open(bind.destination)
                    is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
                    os.close(descriptor)
                    if not is_directory:
                        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _open(self, path: str) -> int:
        for destination, files in self._bound:
            if path.startswith(f"{destination}/"):
                return files.open(path.removeprefix(destination))
        return self.root.open(path)
