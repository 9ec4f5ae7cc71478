"""What no image and no overlay refers to any more: found out, counted, removed."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Mapping, Set

import attrs
import trio

from agent.errors import AgentError, cause_of, failing_as
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, Tag
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.overlay_record import OverlayRecord
from agent.images.packed_image import PackedImage
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# A mount that a process has its hands on, and a directory there that is none of ours.
_IN_THE_WAY = (errno.EBUSY, errno.ENOTEMPTY)


@attrs.frozen
class Stored:
    """Things in the storage, with the bytes that each takes.

    ``blobs`` (manifests and configs too), ``records`` and ``partials`` are by the blob's digest,
    as are ``mounts``; ``layers``, the EROFS images, are by diff_id.
    """

    blobs: Mapping[str, int] = {}
    records: Mapping[str, int] = {}
    partials: Mapping[str, int] = {}
    layers: Mapping[str, int] = {}
    mounts: Set[str] = frozenset()

    @property
    def digests(self) -> frozenset[str]:
        """Everything that is named here."""
        return frozenset().union(self.blobs, self.records, self.partials, self.layers, self.mounts)

    @property
    def total_bytes(self) -> int:
        parts = (self.blobs, self.records, self.partials, self.layers)
        return sum(sum(part.values()) for part in parts)

    def without(self, blobs: Set[str], layers: Set[str]) -> Stored:
        """All of it but what belongs to these blobs, and these layers."""
        return Stored(
            _without(self.blobs, blobs),
            _without(self.records, blobs),
            _without(self.partials, blobs),
            _without(self.layers, layers),
            self.mounts - blobs,
        )


@attrs.frozen
class Collection:
    """What was removed, or would be: the ``images`` that are forgotten, and what is ``garbage``."""

    images: tuple[str, ...]
    garbage: Stored


def plan(
    stored: Stored, tags: Iterable[Tag], overlays: Iterable[OverlayRecord], claimed: Set[str]
) -> Stored:
    """What of ``stored`` is garbage.

    Images need their documents and their layers' blobs, records, EROFS images and mounts; an
    overlay needs the same of its layers, and its image's config. What is ``claimed`` is needed
    whatever it is the digest of.
    """
    blobs, layers = set(claimed), set(claimed)
    for tag in tags:
        blobs |= tag.documents
        blobs |= {layer.digest for layer in tag.image.layers}
        layers |= {layer.diff_id for layer in tag.image.layers}
    for overlay in overlays:
        blobs.add(overlay.config_digest)
        blobs |= {digest for digest, _ in overlay.layers}
        layers |= {diff_id for _, diff_id in overlay.layers}
    return stored.without(blobs, layers)


@attrs.frozen
class GarbageCollector:
    """Collections in ``store`` and ``layers``; what refers to them besides are ``overlays`` and
    ``claims``."""

    store: ContentStore
    layers: LayerStore
    overlays: Overlays
    claims: LayerClaims
    packed: PackedImage | None = None
    """The image of a share, which is forgotten by nobody."""

    async def collect(self, *, dry_run: bool = False, purge_all: bool = False) -> Collection:
        """Remove what nothing refers to, with ``purge_all`` after forgetting all images.

        ``dry_run`` only looks. Collections at once take turns. A cancelled one, or one that is
        killed, has removed a part, and the next one removes the rest.

        Raises:
            AgentError: GC_FAILED, with the cause; as when a cancelled one ends.
        """
        with failing_as(ErrorCode.GC_FAILED, "collect garbage"):
            async with self.claims.collecting() as claimed:
                stored, pins = await trio.to_thread.run_sync(self._look)
                tags = self.store.tags()
                garbage = plan(stored, () if purge_all else tags, pins, claimed)
                forgotten = tuple(tag.entry.reference for tag in tags) if purge_all else ()
                if not dry_run:
                    self.claims.condemn(garbage.digests)
                    if purge_all:
                        await trio.to_thread.run_sync(self.store.forget, forgotten)
                    garbage = await trio.to_thread.run_sync(self._remove, garbage)
        return Collection(forgotten, garbage)

    def _look(self) -> tuple[Stored, set[OverlayRecord]]:
        try:
            pins = self.overlays.pins() | (self.packed.pins() if self.packed is not None else set())
        except OSError as error:
            raise AgentError(
                ErrorCode.GC_FAILED,
                f"collect garbage: nobody knows what an overlay needs: {cause_of(error)}; "
                "clean that overlay up first",
            ) from error
        blobs = self.store.blobs
        return (
            Stored(
                blobs.blob_sizes(),
                blobs.record_sizes(),
                blobs.partial_sizes(),
                self.layers.sizes(),
                self.layers.mounts(),
            ),
            pins,
        )

    def _remove(self, garbage: Stored) -> Stored:
        """What of it is gone now: a layer whose mount is in use stays, with all that is its own."""
        busy = {digest for digest in garbage.mounts if not self._unmount(digest)}
        unpacked = (self.store.blobs.unpacked(digest) for digest in busy)
        garbage = garbage.without(busy, {layer.diff_id for layer in unpacked if layer is not None})
        for diff_id in garbage.layers:
            trio.from_thread.check_cancelled()
            self.layers.remove(diff_id)
        for digest in {*garbage.records, *garbage.blobs, *garbage.partials}:
            trio.from_thread.check_cancelled()
            self.store.blobs.discard(digest)
        return garbage

    def _unmount(self, digest: str) -> bool:
        trio.from_thread.check_cancelled()
        try:
            self.layers.unmount(digest)
        except OSError as error:
            if error.errno not in _IN_THE_WAY:
                raise
            log.warning("%s stays: %s", self.layers.directory(digest), cause_of(error))
            return False
        return True


def _without(sizes: Mapping[str, int], kept: Set[str]) -> dict[str, int]:
    return {digest: size for digest, size in sizes.items() if digest not in kept}
