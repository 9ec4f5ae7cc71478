"""Calls that block on files, each in a thread: waited for, or behind their caller's back.

Nobody waits for another's thread, so there is no limiter: a file system may be a workload's own,
and take its time.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar, TypeVarTuple

import outcome
import trio

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


async def in_thread(work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    """Call what blocks, and wait for it, also when cancelled.

    As trio.to_thread.run_sync, but that a limiter would cost a turn of the loop and a fifth of the
    whole; and trio.from_thread knows nothing of this thread.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()
    token = trio.lowlevel.current_trio_token()
    context = contextvars.copy_context()

    def deliver(result: outcome.Outcome[Result]) -> None:
        token.run_sync_soon(trio.lowlevel.reschedule, task, result)

    trio.lowlevel.start_thread_soon(lambda: context.run(work, *arguments), deliver)
    result: Result = await trio.lowlevel.wait_task_rescheduled(_go_on_waiting)
    return result


def _go_on_waiting(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


class Behind(Generic[Result]):
    """A thread that is given work, and asked for what came of it later.

    Not a nursery's task: what fails is told to who asks for it, and cancels nobody in the middle of
    sending an answer. Leaving the context waits for the call to end, also when cancelled, so that
    nothing which it uses is closed under it.
    """

    def __init__(self) -> None:
        self._done = trio.Event()
        self._done.set()
        self._outcome: outcome.Outcome[Result] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True):
            await self._done.wait()

    def start(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> None:
        """Begin a call; the one before has been finished."""
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def deliver(result: outcome.Outcome[Result]) -> None:
            self._outcome = result
            token.run_sync_soon(done.set)

        self._done = done
        trio.lowlevel.start_thread_soon(lambda: work(*arguments), deliver)

    async def finish(self) -> Result | None:
        """What the call returned or raised, once it has ended; None where there was none."""
        await self._done.wait()
        result, self._outcome = self._outcome, None
        return None if result is None else result.unwrap()
