"""A row of the table: two medians, their ratio, and the target."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import attrs


@attrs.frozen
class Setting:
    """What a row is measured with: an image of the store, and few rounds if it is a trial."""

    image: str
    quick: bool

    def count(self, full: int, quick: int) -> int:
        """How often something is done."""
        return quick if self.quick else full


@attrs.frozen(kw_only=True)
class Ratio:
    """A figure and its reference's; str() is the row's line.

    ``limit`` is the largest ratio allowed, or with ``at_least`` the smallest. A figure at or above
    ``below`` is too much whatever the ratio.
    """

    name: str
    ours: float
    reference: float
    against: str
    unit: str
    limit: float
    at_least: bool = False
    below: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def is_met(self) -> bool:
        if self.below is not None and self.ours >= self.below:
            return False
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit

    def __str__(self) -> str:
        target = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        if self.below is not None:
            target += f", < {self.below:g} {self.unit}"
        ours, reference = (f"{x:8.{_DIGITS[self.unit]}f}" for x in (self.ours, self.reference))
        return (
            f"{self.name:34} {ours} {self.unit:4}  {self.against:38} {reference} {self.unit:4}"
            f"  {self.ratio:6.2f}  {target:16} {verdict(self.is_met)}{self.note}"
        )


_DIGITS = {"µs": 1, "ms": 2, "s": 2, "MB/s": 0}


def verdict(is_met: bool) -> str:
    """How a line ends."""
    return "ok" if is_met else "MISSED"


def interleaved(
    rounds: int, ours: Callable[[], float], reference: Callable[[], float]
) -> tuple[float, float]:
    """The medians of both sides, measured in turns: A B A B …"""
    pairs = [(ours(), reference()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def durations(times: int, action: Callable[[], object]) -> list[float]:
    """How long each of ``times`` calls takes, in seconds."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begun)
    return taken


def median_duration(times: int, action: Callable[[], object]) -> float:
    """The median of that, in seconds."""
    return statistics.median(durations(times, action))


def p99(taken: list[float]) -> float:
    """The time that one in a hundred exceeds."""
    return sorted(taken)[len(taken) * 99 // 100]
