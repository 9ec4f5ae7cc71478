"""Putting the store back to what it was before a pull for which the disk was too small."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import attrs

from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.layer import LayerStore


@attrs.frozen
class Found:
    """What there is of some digests: whole ``blobs`` and their ``records``, ``partials`` with their
    bytes, ``mounts`` by the blob's digest, and ``layers`` by diff_id."""

    blobs: Set[str]
    records: Set[str]
    partials: Mapping[str, int]
    mounts: Set[str]
    layers: Set[str]


@attrs.frozen
class Rollback:
    """Undoes pulls into ``store`` and ``layers``; callers hold what they name in ``claims``."""

    store: ContentStore
    layers: LayerStore
    claims: LayerClaims

    def look(self, digests: Iterable[str]) -> Found:
        """What there is now of an image's digests, diff_ids included. Blocks; raises OSError."""
        digests = frozenset(digests)
        blobs = self.store.blobs
        return Found(
            blobs=frozenset(digest for digest in digests if blobs.path(digest).exists()),
            records=frozenset(digest for digest in digests if blobs.unpacked(digest)),
            partials={digest: blobs.partial_bytes(digest) for digest in digests},
            mounts=self.layers.mounts() & digests,
            layers=frozenset(digest for digest in digests if self.layers.has(digest)),
        )

    def undo(self, digests: Iterable[str], before: Found) -> None:
        """Leave of these what was found before, unless somebody else uses more by now. Blocks.

        Raises:
            OSError: something cannot be removed; a collection will find it.
        """
        used = frozenset().union(*(tag.digests for tag in self.store.tags()))
        free = [
            digest for digest in digests if digest not in used and not self.claims.is_shared(digest)
        ]
        blobs = self.store.blobs
        for digest in free:
            if digest not in before.mounts:
                self.layers.unmount(digest)
            if digest not in before.records:
                blobs.forget_unpacked(digest)
            if digest not in before.blobs:
                blobs.cut_back(digest, before.partials[digest])
        for digest in free:
            if digest not in before.layers and self.layers.has(digest):
                self.layers.remove(digest)
