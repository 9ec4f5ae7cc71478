"""An image's layers as overlayfs stacks them, and what it cannot know of them.

overlayfs takes a directory's mode, owner, time and attributes from the topmost layer that has it.
A layer whose tar has `tmp/x` and no entry for `tmp` has such a directory all the same, and /tmp
would be another than the layers below say. Those are put right in the overlay's upper directory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import attrs

from agent.images.erofs import Marks

_OPAQUE = "trusted.overlay.opaque"
_OF_OVERLAYFS = "trusted.overlay."


@attrs.frozen
class StackedLayer:
    """A layer where it is mounted, with its marks."""

    directory: Path
    marks: Marks


@attrs.frozen(slots=False)
class LayerStack:
    """Layers, the topmost first."""

    layers: tuple[StackedLayer, ...]

    @classmethod
    def of(cls, bottom_first: Sequence[StackedLayer]) -> LayerStack:
        """The layers of an image, as far as none above hides them altogether."""
        visible = []
        for layer in reversed(bottom_first):
            visible.append(layer)
            if layer.marks.opaque_root:
                break
        return cls(tuple(visible))

    @property
    def lowerdirs(self) -> list[Path]:
        return [layer.directory for layer in self.layers]

    def prepare(self, upper: Path) -> None:
        """Give an empty upper directory what it needs for the merged tree to be right. Blocks.

        Raises:
            OSError: a layer or the directory cannot be read or written.
        """
        upper.chmod(0o755)
        made = []
        for path, source in self._inherited:
            directory = upper / os.fsdecode(path)
            if path:
                directory.mkdir()
            _copy_attributes(source, directory)
            made.append((source, directory))
        # Only now, and the deepest first: a new entry changes its directory's time.
        for source, directory in reversed(made):
            status = source.stat()
            os.utime(directory, ns=(status.st_atime_ns, status.st_mtime_ns))

    @cached_property
    def _inherited(self) -> list[tuple[bytes, Path]]:
        """What the upper directory has to have (`b""` is itself), and whose attributes it takes.

        Parents come first. Most images have no such directory but the root.
        """
        wanted: dict[bytes, Path] = {}
        for layer in self.layers:
            if b"" not in layer.marks.implied:
                wanted[b""] = layer.directory
                break
        for path in {path for layer in self.layers for path in layer.marks.implied} - {b""}:
            holders = list(self._holders(path))
            is_wrong = bool(holders) and not holders[0].explicit
            if is_wrong and any(holder.explicit for holder in holders):
                for ancestor in _with_ancestors(path):
                    wanted.setdefault(ancestor, self._source(ancestor))
        return sorted(wanted.items())

    def _source(self, path: bytes) -> Path:
        """Whose attributes a merged directory should have: the topmost that has an entry."""
        holders = list(self._holders(path))
        return next((holder for holder in holders if holder.explicit), holders[0]).directory

    def _holders(self, path: bytes) -> Iterator[_Holder]:
        """The layers' directories that merge into one, the topmost first."""
        for layer in self.layers:
            found, last = _look_up(layer.directory, path)
            if found:
                explicit = path not in layer.marks.implied
                yield _Holder(layer.directory / os.fsdecode(path), explicit)
            if last:
                return


@attrs.frozen
class _Holder:
    directory: Path
    explicit: bool


def _look_up(layer: Path, path: bytes) -> tuple[bool, bool]:
    """Whether a layer has a directory, and whether it hides those of the layers below."""
    last = False
    for ancestor in _with_ancestors(path):
        directory = layer / os.fsdecode(ancestor)
        try:
            status = directory.lstat()
        except FileNotFoundError:
            return False, last
        if not stat.S_ISDIR(status.st_mode):
            return False, True
        last = last or _OPAQUE in _attributes(directory)
    return True, last


def _with_ancestors(path: bytes) -> list[bytes]:
    parts = path.split(b"/")
    return [b"/".join(parts[: n + 1]) for n in range(len(parts))]


def _copy_attributes(source: Path, target: Path) -> None:
    """Owner, mode and extended attributes of a directory."""
    status = source.stat()
    os.chown(target, status.st_uid, status.st_gid)
    target.chmod(stat.S_IMODE(status.st_mode))
    for name in _attributes(source):
        if not name.startswith(_OF_OVERLAYFS):
            os.setxattr(target, name, os.getxattr(source, name))


def _attributes(path: Path) -> list[str]:
    try:
        return os.listxattr(path)
    except OSError as error:
        # A share of the host's may have none.
        if error.errno != errno.ENOTSUP:
            raise
        return []
