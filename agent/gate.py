"""A part of the agent that is still coming up, and who waits for it."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import trio

from agent.errors import AgentError
from agent.uptime import uptime_s
from protocol.errors import ErrorCode

T = TypeVar("T")


class Gate(Generic[T]):
    """Holds a value that becomes known once, or the reason why it never will.

    The listener answers before storage and network are there; a request that needs one of them
    waits here, and a hang-up cancels the wait.
    """

    def __init__(self) -> None:
        self._decided = trio.Event()
        self._values: list[T] = []
        self._failure: AgentError | None = None
        self.decided_s = math.nan
        """When, in seconds after boot."""

    def open(self, value: T) -> None:
        """Let everyone through, with ``value``."""
        self._values = [value]
        self._failure = None
        self._decide()

    def fail(self, failure: AgentError) -> None:
        """Turn everyone back with ``failure``; a later ``open`` lets the next ones through."""
        self._failure = failure
        self._decide()

    def _decide(self) -> None:
        if not self._decided.is_set():
            self.decided_s = uptime_s()
            self._decided.set()

    @property
    def is_open(self) -> bool:
        return bool(self._values)

    @property
    def failure(self) -> AgentError | None:
        """What turns everyone back now, if anything does."""
        return self._failure

    @property
    def value(self) -> T:
        """The value of an open gate.

        Raises:
            LookupError: the gate is not open.
        """
        if not self._values:
            raise LookupError("the gate is not open")
        return self._values[0]

    async def decided(self) -> None:
        """Return once the value is known, or it is known that there will be none.

        At once where that is so already, and without a turn of the loop.
        """
        if not self._decided.is_set():
            await self._decided.wait()

    async def passed(self, code: ErrorCode) -> T:
        """The value, once it is known.

        Raises:
            AgentError: the part could not be brought up; with the waiting request's ``code``.
        """
        await self._decided.wait()
        if self._failure is not None:
            raise AgentError(code, self._failure.message)
        return self.value
