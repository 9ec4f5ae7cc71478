"""Trying again, from a worker thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import trio

from agent.images.registries import RegistryError
from protocol.retry import RetryPolicy

log = logging.getLogger(__name__)

T = TypeVar("T")

# A host waits some minutes for a pull, and rather hears that it is to come back later.
_LONGEST_RETRY_AFTER_S = 60


class Persistence:
    """The attempts that a policy allows for one thing, counted over all its failures.

    For worker threads of trio: waiting ends at once when the task that they work for is cancelled.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._attempts = policy.attempts
        self._delays = policy.delays()

    def wait(self, failure: RegistryError) -> None:
        """Return when it is time for the next attempt.

        Raises:
            RegistryError: `failure`, where there is to be none.
        """
        # What is cancelled fails too, since its connections are closed under it.
        trio.from_thread.check_cancelled()
        if not failure.transient:
            raise failure
        asked_s = failure.retry_after_s or 0
        if asked_s > _LONGEST_RETRY_AFTER_S:
            raise RegistryError(f"{failure}, and asks to wait for {asked_s:.0f} s")
        delay_s = next(self._delays, None)
        if delay_s is None:
            tries = f" ({self._attempts} attempts)" if self._attempts > 1 else ""
            raise RegistryError(
                f"{failure}{tries}", transient=True, unreachable=failure.unreachable
            )
        log.info("%s; trying again in %.1f s", failure, max(delay_s, asked_s))
        trio.from_thread.run(trio.sleep, max(delay_s, asked_s))

    def call(self, request: Callable[[], T]) -> T:
        """What `request` returns, once it does not fail with a transient RegistryError."""
        while True:
            try:
                return request()
            except RegistryError as failure:
                self.wait(failure)
