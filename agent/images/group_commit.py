"""Tasks that finish together have what they made put on the disk together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import trio

from agent.images.blob_store import WholeLayer


@attrs.define(eq=False)
class _Request:
    layer: WholeLayer
    is_done: bool = False
    failure: OSError | None = None


class GroupCommit:
    """Hands layers to `commit` in a worker thread: one group at a time, of all that have come
    while the one before was on its way. For trio tasks.

    ``commit`` answers with a failure or None for each layer. A disk takes hardly longer for many
    than for one, and forty small layers, each by itself, wait for the disk most of their time.
    """

    def __init__(self, commit: Callable[[Sequence[WholeLayer]], Sequence[OSError | None]]) -> None:
        self._commit = commit
        self._queue: list[_Request] = []
        self._committing = trio.Lock()

    async def add(self, layer: WholeLayer) -> None:
        """Return when the layer is in the store.

        Raises:
            OSError: it cannot be.
            trio.Cancelled: and then it may be, or not.
        """
        request = _Request(layer)
        self._queue.append(request)
        try:
            async with self._committing:
                # Whoever had the lock before may have seen to ours.
                if not request.is_done:
                    await self._commit_queue()
        finally:
            if request in self._queue:
                self._queue.remove(request)
        if request.failure is not None:
            raise request.failure

    async def _commit_queue(self) -> None:
        group, self._queue = self._queue, []
        layers = [request.layer for request in group]
        # The others are not to suffer from the cancellation of this one's task.
        with trio.CancelScope(shield=True):
            failures = await trio.to_thread.run_sync(self._commit, layers)
        for request, failure in zip(group, failures, strict=True):
            request.is_done, request.failure = True, failure
