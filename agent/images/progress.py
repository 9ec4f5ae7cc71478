"""How far a pull is, told a few times a second."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import attrs
import trio

T = TypeVar("T")

# Between one and ten a second, with room for a busy machine and for the last one.
_SHORTEST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 0.5
_RATE_WINDOW_S = 5

# What layers come in.
_BLOCK = 1 << 20
# A block of the file system: it was not there.
_SMALLEST_LACK = 4096


@attrs.frozen
class PullProgress:
    """``percent`` (0 to 100) never falls within a pull; ``layer`` is a digest's hex.

    Bytes are those of blobs, compressed as they are; ``bytes_per_s`` is of the last seconds, and
    the time that is left follows from it. Both are None until there is something to go by.
    """

    message: str
    percent: int | None = None
    layer: str | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None
    bytes_per_s: int | None = None
    seconds_left: int | None = None


OnProgress = Callable[[PullProgress], Awaitable[None]]


class ProgressMeter:
    """Counts the bytes of the layers that a pull still needs.

    `layer_count` is of all the image's layers, `needed` the digests and sizes of those that are
    not in the store. Made and used in a trio task, but for `advance`, which worker threads call.
    """

    def __init__(self, layer_count: int, needed: Iterable[tuple[str, int]]) -> None:
        self._layer_count = layer_count
        self._sizes = dict(needed)
        self._finished = layer_count - len(self._sizes)
        self._positions = dict.fromkeys(self._sizes, 0)
        self._total_bytes = sum(self._sizes.values())
        self._latest = next(iter(self._sizes), None)
        self._percent = 0
        self._samples: deque[tuple[float, int]] = deque()
        self._changed = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def advance(self, digest: str, position: int) -> None:
        """So many bytes of a layer are through; fewer than before where it had to begin anew."""
        self._positions[digest] = position
        self._latest = digest
        self._token.run_sync_soon(self._wake, idempotent=True)

    def finish(self, digest: str) -> None:
        """A layer is in the store."""
        self._positions[digest] = self._sizes[digest]
        self._finished += 1
        self._wake()

    @property
    def remaining_bytes(self) -> int:
        """How much of the needed layers' blobs is not through."""
        return self._total_bytes - sum(self._positions.values())

    def missing_bytes(self, digest: str, unpacked_bytes: int) -> int:
        """What the layers will still take of a disk, if all grow as one did when it was unpacked.

        Each byte takes room twice, in the blob and, grown, in the EROFS image.
        """
        through = max(self._positions[digest], min(self._sizes[digest], _BLOCK))
        growth = max(1.0, unpacked_bytes / max(through, 1))
        return max(round(self.remaining_bytes * (1 + growth)), _SMALLEST_LACK)

    def frame(self) -> PullProgress:
        """How far it is now."""
        done = self._total_bytes - self.remaining_bytes
        self._percent = max(self._percent, 100 * done // max(self._total_bytes, 1))
        number = min(self._finished + 1, self._layer_count)
        rate = self._rate(done)
        return PullProgress(
            message=f"Pulling layer {number}/{self._layer_count}",
            percent=self._percent,
            layer=self._latest.removeprefix("sha256:") if self._latest else None,
            done_bytes=done,
            total_bytes=self._total_bytes,
            bytes_per_s=rate,
            seconds_left=math.ceil((self._total_bytes - done) / rate) if rate else None,
        )

    def _rate(self, done: int) -> int | None:
        """Bytes a second in the last seconds; None before there is a first one."""
        now = trio.current_time()
        self._samples.append((now, done))
        while now - self._samples[0][0] > _RATE_WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()
        begun, before = self._samples[0]
        if now - begun < _SHORTEST_PAUSE_S:
            return None
        return max(0, round((done - before) / (now - begun)))

    async def report(self, on_progress: OnProgress, stopped: trio.Event) -> None:
        """Tell how far it is, at once and then again and again until stopped."""
        while not stopped.is_set():
            self._changed = trio.Event()
            await on_progress(self.frame())
            with trio.move_on_after(_SHORTEST_PAUSE_S):  # the limit of the rate, not a poll
                await stopped.wait()
            with trio.move_on_after(_LONGEST_PAUSE_S - _SHORTEST_PAUSE_S):
                await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()


async def report_waiting(message: str, on_progress: OnProgress, stopped: trio.Event) -> None:
    """Tell the same again and again until stopped, and nothing if that is soon."""
    while True:
        with trio.move_on_after(_LONGEST_PAUSE_S):
            await stopped.wait()
            return
        await on_progress(PullProgress(message))


async def telling(
    work: Callable[[], Awaitable[T]], report: Callable[[trio.Event], Awaitable[None]]
) -> T:
    """What `work` returns or raises, with `report` beside it, which its event stops.

    It is stopped and not cancelled, since it may be in the middle of a frame; what it raises ends
    the work.
    """
    stopped = trio.Event()
    results: list[T] = []
    failure = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(report, stopped)
            try:
                results.append(await work())
            except Exception as error:  # noqa: BLE001 - raised again below
                failure = error
            stopped.set()
    except BaseExceptionGroup as group:
        raise first_failure(group) or group from None
    if failure is not None:
        raise failure
    return results[0]


def first_failure(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """What failed first in a group that nurseries made; None where all was cancelled."""
    for error in group.exceptions:
        failure = first_failure(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(failure, Exception):
            return failure
    return None
