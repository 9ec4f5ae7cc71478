"""The layers that overlays are made of: those of the store, and directories of a packed share."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import attrs

from agent.errors import AgentError
from agent.images.erofs import Marks
from agent.images.layer import LayerStore
from agent.images.packed_share import PackedShare, unpacked_id
from agent.linux.mount import MOUNT_ATTR_RDONLY, MS_PRIVATE, mount_setattr, open_tree
from protocol.errors import ErrorCode


@attrs.frozen
class OverlayLayers:
    """The layers of ``store``, and those of ``share``, if there is one, beside them. Blocks."""

    store: LayerStore
    share: PackedShare | None = None

    def mount(self, digest: str, diff_id: str) -> Path:
        """Mount a layer, unless it is mounted; where.

        Raises:
            FileNotFoundError: it is not in the store.
            AgentError: OVERLAY_FAILED: it is not in the share.
            OSError: the kernel cannot mount it.
        """
        layer_id = unpacked_id(digest, diff_id)
        if layer_id is None:
            return self.store.mount(digest, diff_id)
        if self.share is None:
            raise AgentError(
                ErrorCode.OVERLAY_FAILED,
                f"the packed layer {layer_id!r} is not here, for this boot names no share of "
                "packed layers",
            )
        try:
            directory = self.share.directory(layer_id)
        except FileNotFoundError as error:
            raise AgentError(
                ErrorCode.OVERLAY_FAILED,
                f"the share of packed layers has no directory {layer_id!r} any more",
            ) from error
        return self.store.attach(layer_id, partial(_read_only, directory))

    def marks(self, digest: str, diff_id: str) -> Marks:
        """What a layer means for those below it; a directory says it to overlayfs itself."""
        if unpacked_id(digest, diff_id) is not None:
            return Marks()
        return self.store.marks(diff_id)


def _read_only(directory: Path) -> int:
    """A directory as a mount, attached nowhere; the descriptor is the caller's to close."""
    tree = open_tree(directory)
    mount_setattr(tree, set_attributes=MOUNT_ATTR_RDONLY, propagation=MS_PRIVATE)
    return tree
