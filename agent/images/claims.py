"""Which layers running pulls use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import attrs
import trio


@attrs.define
class _Claim:
    users: int = 0
    lock: trio.Lock = attrs.field(factory=trio.Lock)


class LayerClaims:
    """The blobs and tars (by digest and by diff_id) of the layers of the pulls that run now.

    Two pulls that need one layer fetch it once, one after the other under its lock, and neither
    removes what the other uses. For trio tasks.
    """

    def __init__(self) -> None:
        self._claims: dict[str, _Claim] = {}

    @contextmanager
    def held(self, digests: Iterable[str]) -> Iterator[None]:
        """Use these until the block is left."""
        held = frozenset(digests)
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
        """Whether another pull beside the caller's uses it."""
        return self._claims[digest].users > 1
