"""What one entry of a layer's tar becomes: entries under final names, for mkfs.erofs.

Whiteouts are OCI's (https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts):
`.wh.x` removes what the layers below have at `x`, `.wh..wh..opq` all that they have in its
directory; neither touches the layer's own entries, whichever come first.
"""

from __future__ import annotations

import os
import stat

from agent.images.layer_tree import WHITEOUT, WHITEOUT_PREFIX, Directory, LayerTree, Place
from agent.images.tar_header import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    FIFO,
    HARD_LINK,
    REGULAR,
    SYMLINK,
    Header,
    TarError,
    encode,
)

_META_PREFIX = b".wh..wh."
_OPAQUE = b".wh..wh..opq"

_FORMATS = {
    REGULAR: stat.S_IFREG,
    CHARACTER_DEVICE: stat.S_IFCHR,
    BLOCK_DEVICE: stat.S_IFBLK,
    FIFO: stat.S_IFIFO,
}

# As docker makes a directory that has no entry; mkfs.erofs would let everybody write to it.
IMPLIED_MODE = 0o755


def enter(tree: LayerTree, header: Header) -> list[bytes]:
    """Put an entry into the tree; the headers that say so, its own last, its content to follow.

    ``header`` gets its final path, link and size; the size is 0 where its content is not wanted.

    Raises:
        TarError: there is no place for it.
    """
    if _META_PREFIX in header.path:
        parts = header.path.split(b"/")
        if any(part.startswith(_META_PREFIX) and part != _OPAQUE for part in parts):
            header.size = 0  # what AUFS kept for itself
            return []
    place = tree.place(header.path)
    written = [piece for path, directory in place.implied for piece in _implied(path, directory)]
    if place.name.startswith(WHITEOUT_PREFIX):
        header.size = 0
        return written + _whiteout(tree, place)
    header.path = place.path
    if header.kind == DIRECTORY:
        return written + _directory(tree, header, place)
    if not place.name:
        raise TarError("it is the root, and no directory")
    if header.kind == HARD_LINK:
        return written + _hard_link(tree, header, place)
    if header.kind == SYMLINK:
        header.mode = 0o777  # Linux knows no other
        tree.put(place, header.link)
    else:
        tree.put(place, _FORMATS[header.kind])
    return [*written, encode(header)]


def root() -> bytes:
    """The header of the root as docker makes it, for layers that have no entry for it."""
    return encode(Header(DIRECTORY, b"./", mode=IMPLIED_MODE))


def _implied(path: bytes, directory: Directory) -> list[bytes]:
    if path.rpartition(b"/")[2].startswith(WHITEOUT_PREFIX):
        raise TarError("it lies below a whiteout")
    return [encode(Header(DIRECTORY, path, mode=IMPLIED_MODE)), *_opacity(path, directory)]


def _whiteout(tree: LayerTree, place: Place) -> list[bytes]:
    directory = place.directory
    if place.name == _OPAQUE:
        directory.opaque = True
        return _opacity(place.parent, directory)
    name = place.name.removeprefix(WHITEOUT_PREFIX)
    if name in (b"", b".", b".."):
        raise TarError("it is a whiteout of nothing")
    node = directory.get(name)
    if node is None:
        tree.put(place.sibling(name), WHITEOUT)
        return [encode(Header(REGULAR, place.path))]
    if isinstance(node, Directory):
        node.opaque = True
        return _opacity(place.sibling(name).path, node)
    return []


def _directory(tree: LayerTree, header: Header, place: Place) -> list[bytes]:
    if not place.name:
        tree.root.explicit = True
        header.path = b"./"
        return [encode(header)]
    node = place.directory.get(place.name)
    if isinstance(node, Directory):
        node.explicit = True
        return [encode(header)]
    # Without this what the layers below have in a directory of that name would show through.
    made = Directory(place.directory, explicit=True, opaque=node == WHITEOUT)
    tree.put(place, made)
    return [encode(header), *_opacity(header.path, made)]


def _hard_link(tree: LayerTree, header: Header, place: Place) -> list[bytes]:
    tree.clear(place)
    target, node = tree.find(header.link)
    shown = repr(os.fsdecode(header.link))
    if isinstance(node, Directory):
        raise TarError(f"it is a hard link to {shown}, a directory")
    if node is None:
        raise TarError(f"it is a hard link to {shown}, which this layer does not have")
    if target.path == place.path:
        return []
    header.link = target.path
    tree.put(place, node)
    return [encode(header)]


def _opacity(path: bytes, directory: Directory) -> list[bytes]:
    """What marks a directory as opaque; the root has no name that a marker could follow."""
    if not directory.opaque or not path:
        return []
    return [encode(Header(REGULAR, path + b"/" + _OPAQUE))]
