"""Which blobs and layers are in use now, and which are being removed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager

import attrs
import trio


@attrs.define
class _Claim:
    users: int = 0
    lock: trio.Lock = attrs.field(factory=trio.Lock)


class LayerClaims:
    """The blobs and layers (by digest and by diff_id) that somebody uses at the moment: pulls,
    overlays while they are made or have no record, exports.

    Two pulls that need one layer fetch it once, one after the other under its lock, and neither
    removes what the other uses. A collection removes nothing that is claimed, and who claims
    something that is being removed waits until it is gone. For trio tasks.
    """

    def __init__(self) -> None:
        self._claims: dict[str, _Claim] = {}
        self._collection = trio.Lock()
        self._is_planning = False
        self._condemned: frozenset[str] = frozenset()
        self._waiting = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def held(self, digests: Iterable[str]) -> AsyncIterator[None]:
        """Use these until the block is left.

        What was there before may be gone when the block begins, and only then: look again.
        """
        held = frozenset(digests)
        while self._is_planning or not self._condemned.isdisjoint(held):
            await self._waiting.park()
        for digest in held:
            self._claims.setdefault(digest, _Claim()).users += 1
        try:
            yield
        finally:
            for digest in held:
                claim = self._claims[digest]
                claim.users -= 1
                if not claim.users:
                    del self._claims[digest]

    def lock(self, digest: str) -> trio.Lock:
        """The lock of one that the caller holds."""
        return self._claims[digest].lock

    def is_shared(self, digest: str) -> bool:
        """Whether another user beside the caller has it."""
        return self._claims[digest].users > 1

    @asynccontextmanager
    async def collecting(self) -> AsyncIterator[frozenset[str]]:
        """Find out, and then remove, what nobody uses; one collection at a time. Gives all claims.

        Until ``condemn`` nothing new is claimed: so whoever makes something refer to a digest (a
        tag, an overlay's record) either has claimed it, or has done so before the block began and
        it can be read. The block should not be long in getting there.
        """
        async with self._collection:
            self._is_planning = True
            try:
                yield frozenset(self._claims)
            finally:
                self._is_planning = False
                self.condemn(())

    def condemn(self, digests: Collection[str]) -> None:
        """For a collection: these are about to be removed; all others may be claimed again."""
        self._is_planning = False
        self._condemned = frozenset(digests)
        self._waiting.unpark_all()
