"""Calls in threads that nobody leaves behind."""

import contextvars
import threading

import pytest
import trio

from agent.files.behind import in_thread


async def test_what_a_thread_returns_or_raises_is_its_callers() -> None:
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


async def test_a_thread_has_its_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")
    assert await in_thread(variable.get) == "the caller's"
    assert await in_thread(threading.get_ident) != threading.get_ident()


async def test_a_caller_that_is_cancelled_waits_for_its_thread() -> None:
    started, go_on = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    ended: list[str] = []

    def work() -> None:
        token.run_sync_soon(started.set)
        go_on.wait()
        ended.append("the thread")

    async def call() -> None:
        await in_thread(work)
        ended.append("the caller")
        await trio.lowlevel.checkpoint()
        raise AssertionError("it was not cancelled")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await started.wait()
        nursery.cancel_scope.cancel()
        for _ in range(10):
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
        assert ended == []
        go_on.set()
    assert ended == ["the thread", "the caller"]


async def test_a_caller_that_is_cancelled_already_begins_no_thread() -> None:
    begun: list[bool] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_thread(begun.append, True)
    assert scope.cancelled_caught
    assert begun == []
