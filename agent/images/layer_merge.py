"""Layers as directories, merged into one tree by overlayfs's rules.

https://docs.kernel.org/filesystems/overlayfs.html: a name is what the topmost layer that has it
says; directories merge, down to one that is opaque or to something that is no directory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs

from agent.errors import cause_of
from agent.images.entry_copy import (
    OVERLAY_PREFIXES,
    copy_attributes,
    copy_entry,
    overlay_aware_names,
)
from agent.images.erofs import Marks
from agent.linux.openat2 import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_WITHIN = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV

_OPAQUE = tuple(f"{prefix}opaque" for prefix in OVERLAY_PREFIXES)
_WHITEOUT = tuple(f"{prefix}whiteout" for prefix in OVERLAY_PREFIXES)
_HIDES_ALL, _HAS_WHITEOUT_FILES = b"y", b"x"


class MergeError(Exception):
    """The layers cannot be merged; the text names the entry, its layer and the cause."""


@attrs.frozen
class Lowerdir:
    """A layer's directory, and what it means beyond what is in it."""

    directory: Path
    marks: Marks


@attrs.frozen
class _Layer:
    directory: Path
    root: int
    marks: Marks

    @property
    def hides_all(self) -> bool:
        return self.marks.opaque_root or _opaqueness(self.root) == _HIDES_ALL


@attrs.define
class _Merged:
    """A directory to be: the layers that have it, topmost first, until one hides the rest."""

    layers: list[_Layer] = attrs.field(factory=list)
    hides_rest: bool = False


class LayerMerge:
    """Copies what ``lowerdirs``, topmost first, amount to into ``target``, which is empty.

    Those that do not exist, and those that are empty, have no say. ``check_cancelled`` is called
    now and then, and may raise. Used once; blocks.
    """

    def __init__(
        self, lowerdirs: Sequence[Lowerdir], target: Path, check_cancelled: Callable[[], None]
    ) -> None:
        self._lowerdirs = lowerdirs
        self._target_path = target
        self._check_cancelled = check_cancelled
        self._target = -1
        self._first_names: dict[tuple[int, int], str] = {}
        """Where files with several names are, in the target, by device and inode."""
        self._made: list[tuple[str, Sequence[_Layer]]] = []

    def run(self) -> None:
        """Return when the target is whole, but not synced.

        Raises:
            MergeError: an entry cannot be read or made; or is none that can be merged.
        """
        with ExitStack() as held:
            with _naming(self._target_path):
                self._target = os.open(self._target_path, _DIRECTORY)
            held.callback(os.close, self._target)
            layers: list[_Layer] = []
            for lowerdir in self._lowerdirs:
                with _naming(lowerdir.directory):
                    layer = _opened(lowerdir)
                    if layer is not None:
                        held.callback(os.close, layer.root)
                        layers.append(layer)
                        if layer.hides_all:
                            break
            waiting = [("", layers)] if layers else []
            while waiting:
                waiting += self._merge(*waiting.pop())
            # Only now, and the deepest first: a new entry changes its directory's time, and gets
            # some of its attributes.
            for path, having in reversed(self._made):
                self._finish(path, having)

    def _merge(self, path: str, layers: Sequence[_Layer]) -> list[tuple[str, list[_Layer]]]:
        """Fill one directory of the target; those in it, still empty, and their layers."""
        names: dict[str, _Merged | None] = {}
        self._made.append((path, layers))
        with _naming(self._target_path / path), _directory(self._target, path) as target:
            for layer in layers:
                with _naming(layer.directory / path), _directory(layer.root, path) as source:
                    self._add(names, layer, path, source, target)
            merged = [(name, directory) for name, directory in names.items() if directory]
            for name, _ in merged:
                os.mkdir(name, 0o700, dir_fd=target)
        return [(_joined(path, name), directory.layers) for name, directory in merged]

    def _add(
        self, names: dict[str, _Merged | None], layer: _Layer, path: str, source: int, target: int
    ) -> None:
        """Add what a layer has in a directory, below what others have; None is decided."""
        has_whiteout_files = _opaqueness(source) == _HAS_WHITEOUT_FILES
        with os.scandir(source) as entries:
            found = list(entries)
        for entry in found:
            self._check_cancelled()
            name = entry.name
            with _naming(layer.directory / path / name):
                status = entry.stat(follow_symlinks=False)
                is_first = name not in names
                directory = names.get(name)
                if stat.S_ISDIR(status.st_mode):
                    if is_first:
                        directory = names[name] = _Merged()
                    if directory is not None and not directory.hides_rest:
                        directory.layers.append(layer)
                        directory.hides_rest = _opaqueness(_path(source, name)) == _HIDES_ALL
                elif directory is not None:
                    directory.hides_rest = True
                elif is_first:
                    names[name] = None
                    if not _is_whiteout(source, name, status, has_whiteout_files):
                        self._copy(source, name, status, target, _joined(path, name))

    def _copy(self, source: int, name: str, status: os.stat_result, target: int, path: str) -> None:
        inode = (status.st_dev, status.st_ino)
        first = self._first_names.get(inode) if status.st_nlink > 1 else None
        if first is not None:
            os.link(first, name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False)
            return
        copy_entry(source, name, status, target, self._check_cancelled)
        if status.st_nlink > 1:
            self._first_names[inode] = path

    def _finish(self, path: str, layers: Sequence[_Layer]) -> None:
        """Make a directory of the target what the topmost layer says that has an entry for it."""
        name = os.fsencode(path)
        layer = next((layer for layer in layers if name not in layer.marks.implied), layers[0])
        with (
            _naming(layer.directory / path),
            _directory(layer.root, path) as source,
            _directory(self._target, path) as target,
        ):
            status = os.fstat(source)
            copy_attributes(source, status, target)
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _opened(lowerdir: Lowerdir) -> _Layer | None:
    """A layer's directory, open; None for one without a say."""
    try:
        root = os.open(lowerdir.directory, _DIRECTORY)
    except FileNotFoundError:
        return None
    layer = _Layer(lowerdir.directory, root, lowerdir.marks)
    with os.scandir(root) as entries:
        is_empty = next(entries, None) is None
    if is_empty and not layer.hides_all:
        os.close(root)
        return None
    return layer


def _opaqueness(directory: int | str) -> bytes:
    """What overlayfs's `opaque` says, whoever has set it."""
    names = overlay_aware_names(directory)
    for name in _OPAQUE:
        if name in names:
            return os.getxattr(directory, name, follow_symlinks=isinstance(directory, int))
    return b""


def _is_whiteout(source: int, name: str, status: os.stat_result, has_whiteout_files: bool) -> bool:
    if stat.S_ISCHR(status.st_mode):
        return status.st_rdev == 0
    # What an overlay inside an overlay has in the place of devices.
    if has_whiteout_files and stat.S_ISREG(status.st_mode) and not status.st_size:
        return not set(_WHITEOUT).isdisjoint(overlay_aware_names(_path(source, name)))
    return False


def _path(directory: int, name: str) -> str:
    return f"/proc/self/fd/{directory}/{name}"


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


@contextmanager
def _directory(root: int, path: str) -> Iterator[int]:
    """A directory below an open one, reached through no link and into no other mount."""
    descriptor = openat2(root, path or ".", _DIRECTORY, resolve=_WITHIN)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MergeError(f"{path}: {error.strerror or cause_of(error)}") from error
