"""Work on a stream that goes on in a second thread, while the first gets what comes next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Chunk = bytes | memoryview


class Relay:
    """Hands chunks to `take` in a thread of its own, which the caller closes whatever happens.

    At most `most_waiting` chunks wait; the caller keeps their number of bytes small. Used by one
    thread. All that blocks here ends when `take` returns or raises.
    """

    def __init__(self, take: Callable[[Chunk], None], most_waiting: int) -> None:
        self._take = take
        self._most_waiting = most_waiting
        self._waiting: deque[Chunk | None] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="relay")
        self._thread.start()

    def put(self, chunk: Chunk) -> None:
        """Hand over the next chunk; blocks while too many wait. Raises what `take` raised."""
        with self._changed:
            while len(self._waiting) >= self._most_waiting and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            self._waiting.append(chunk)
            self._changed.notify()

    def finish(self) -> None:
        """Return when all chunks are taken. Raises what `take` raised."""
        with self._changed:
            self._waiting.append(None)
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Return when the thread has ended, after at most the chunk that it has."""
        with self._changed:
            self._waiting.clear()
            self._waiting.append(None)
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while (chunk := self._next()) is not None:
                self._take(chunk)
        except Exception as error:  # noqa: BLE001 - raised again by the other thread
            with self._changed:
                self._failure = error
                self._changed.notify()

    def _next(self) -> Chunk | None:
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            chunk = self._waiting.popleft()
            self._changed.notify()
        return chunk
