"""A local file tree as a tar stream, in the form that the agent's tar takes it."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import attrs

_BLOCK: Final = 512
_HEADERS: Final = 3 * _BLOCK
"""Of one entry: its own, and an extended one with its time to the nanosecond."""
_BUFFER: Final = 1024 * 1024
_KEPT_BITS: Final = 0o1777


@attrs.frozen
class Source:
    """What is to be packed: ``path``, as ``name`` in the stream."""

    path: Path
    name: str
    with_owners: bool = False
    """Or else all belongs to root."""
    follow: bool = False
    """Whether a symbolic link at ``path`` itself stands for what it leads to."""

    def total_bytes(self) -> int:
        """About how long the stream will be. Raises OSError."""
        return _BUFFER // 100 + sum(
            _HEADERS + -(-status.st_size // _BLOCK) * _BLOCK
            if stat.S_ISREG(status.st_mode)
            else _HEADERS
            for _, _, status in self._entries()
        )

    def write(self, stream: IO[bytes]) -> None:
        """Write the stream; sockets are left out.

        Raises:
            OSError: naming what cannot be read, or has changed while it was.
        """
        with tarfile.open(
            fileobj=stream, mode="w|", bufsize=_BUFFER, format=tarfile.PAX_FORMAT
        ) as archive:
            for path, name, status in self._entries():
                if stat.S_ISSOCK(status.st_mode):
                    continue
                info = self._header(archive, path, name, status)
                if not info.isreg():
                    archive.addfile(info)
                    continue
                with path.open("rb", buffering=0) as file:
                    try:
                        archive.addfile(info, file)
                    except OSError as error:
                        if error.errno is not None:
                            raise
                        # tarfile's own word: there is less of it than it said at first.
                        raise OSError(0, "it became shorter while it was read", str(path)) from None
                # It would keep them all, to find them again.
                archive.members = []  # type: ignore[attr-defined]

    def _header(
        self, archive: tarfile.TarFile, path: Path, name: str, status: os.stat_result
    ) -> tarfile.TarInfo:
        archive.dereference = self.follow and path == self.path
        info = archive.gettarinfo(path, name)
        seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
        info.mtime = seconds
        info.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09}"}
        if not self.with_owners:
            info.uid = info.gid = 0
            # Set-user-ID would be for another user than was meant.
            info.mode &= _KEPT_BITS
        # By number only: names mean other numbers there.
        info.uname = info.gname = ""
        return info

    def _entries(self) -> Iterator[tuple[Path, str, os.stat_result]]:
        status = self.path.stat() if self.follow else self.path.lstat()
        yield self.path, self.name, status
        if stat.S_ISDIR(status.st_mode):
            yield from _below(self.path, self.name)


def _below(directory: Path, name: str) -> Iterator[tuple[Path, str, os.stat_result]]:
    with os.scandir(directory) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        inner = f"{name}/{entry.name}"
        path = Path(entry.path)
        yield path, inner, entry.stat(follow_symlinks=False)
        if entry.is_dir(follow_symlinks=False):
            yield from _below(path, inner)
