"""A share of the host's that holds an image's layers: the smolvm launcher's packed layers.

<id>/           a layer, as overlayfs is to have it
<id>.tar        a layer's tar; it counts where there is no <id>/
layer-order     the ids, one a line, the bottom layer first; without it their names' order
config.json     the image's config, as the OCI image specification has it; there may be none
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import attrs

_ORDER = "layer-order"
_CONFIG = "config.json"
_TAR = ".tar"
# Of volumes, and what is being unpacked.
_NO_LAYERS = ("lost+found",)
_PARTIAL = ".partial"

# In the place of a diff_id, which a directory has not.
_UNPACKED = "packed:"


class PackedError(Exception):
    """The share holds no image; the text names what is wrong with it."""


@attrs.frozen
class PackedEntry:
    """A layer of the share: its id, and its tar where it is one."""

    id: str
    tar: Path | None = None


@attrs.frozen
class PackedShare:
    """The share, which ``mounted`` mounts where it is not yet, and tells where.

    Everything blocks, and raises AgentError where there is no such share, or OSError.
    """

    mounted: Callable[[], Path]

    def entries(self) -> list[PackedEntry]:
        """The layers, bottom first.

        Raises:
            PackedError: there are none, or one has a name that cannot be told.
        """
        directory = self.mounted()
        found: dict[str, PackedEntry] = {}
        for each in sorted(os.scandir(directory), key=lambda each: each.name):
            layer = _entry(each)
            if layer is None:
                continue
            if not layer.id.isprintable():
                raise PackedError(f"{directory}: the layer {layer.id!r} has no printable name")
            if layer.tar is None or layer.id not in found:
                found[layer.id] = layer
        if not found:
            raise PackedError(f"{directory}: there are no directories or tars in it")
        named = [each for each in _lines(directory / _ORDER) if each in found]
        return [found[each] for each in dict.fromkeys(named or sorted(found))]

    def config(self) -> bytes | None:
        """The image's config, where there is one."""
        try:
            return (self.mounted() / _CONFIG).read_bytes()
        except FileNotFoundError:
            return None

    def directory(self, layer_id: str) -> Path:
        """A layer's directory.

        Raises:
            FileNotFoundError: the share has none of that id.
        """
        directory = self.mounted() / layer_id
        if not directory.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
        return directory


def unpacked_names(layer_id: str) -> tuple[str, str]:
    """What stands for a directory in the place of a blob's digest, and of a diff_id."""
    return f"sha256:{layer_id}", f"{_UNPACKED}{layer_id}"


def unpacked_id(digest: str, diff_id: str) -> str | None:
    """The directory that the two stand for, if it is one."""
    layer_id = diff_id.removeprefix(_UNPACKED)
    is_name = layer_id not in ("", ".", "..") and "/" not in layer_id and "\0" not in layer_id
    return layer_id if is_name and (digest, diff_id) == unpacked_names(layer_id) else None


def _entry(each: os.DirEntry[str]) -> PackedEntry | None:
    name = each.name
    if name.startswith(".") or name in _NO_LAYERS or name.endswith(_PARTIAL):
        return None
    if each.is_dir(follow_symlinks=False):
        return PackedEntry(name)
    if name.endswith(_TAR) and each.is_file(follow_symlinks=False):
        return PackedEntry(name.removesuffix(_TAR), Path(each.path))
    return None


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(errors="replace").splitlines()]
    except FileNotFoundError:
        return []
