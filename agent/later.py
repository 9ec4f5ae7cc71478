"""A part that is made when it is first asked for, because the agent's start can do without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Later(Generic[T]):
    """Made once, by a function that may import what it needs, in a thread."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._turn = trio.Lock()
        # Not the others' threads: all of those may wait for what ``diagnose`` is to find.
        self._thread = trio.CapacityLimiter(1)

    async def value(self) -> T:
        """The part; raises what making it raises, and then the next one to ask tries again."""
        async with self._turn:
            if not self._made:
                self._made.append(await trio.to_thread.run_sync(self._make, limiter=self._thread))
        return self._made[0]
