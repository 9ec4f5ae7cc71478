"""Waiting for a part of the agent that is still coming up."""

import pytest
import trio
import trio.testing

from agent.errors import AgentError
from agent.gate import Gate
from protocol.errors import ErrorCode


async def test_those_who_wait_pass_when_it_opens() -> None:
    gate: Gate[str] = Gate()
    seen: list[str] = []

    async def pass_through() -> None:
        seen.append(await gate.passed(ErrorCode.PULL_FAILED))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_through)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        gate.open("storage")
    assert seen == ["storage"]


async def test_none_is_a_value_too() -> None:
    gate: Gate[None] = Gate()
    gate.open(None)
    assert gate.is_open
    assert await gate.passed(ErrorCode.PULL_FAILED) is None


async def test_a_failure_turns_them_back_with_the_code_of_their_own_request() -> None:
    gate: Gate[str] = Gate()
    gate.fail(AgentError(ErrorCode.MOUNT_FAILED, "mount /dev/vdx: no such device"))
    with pytest.raises(AgentError, match="mount /dev/vdx: no such device") as refusal:
        await gate.passed(ErrorCode.PULL_FAILED)
    assert refusal.value.code is ErrorCode.PULL_FAILED
    assert not gate.is_open


async def test_a_later_opening_lets_the_next_ones_through() -> None:
    gate: Gate[str] = Gate()
    gate.fail(AgentError(ErrorCode.MOUNT_FAILED, "not yet"))
    gate.open("storage")
    assert await gate.passed(ErrorCode.PULL_FAILED) == "storage"


def test_the_value_of_a_closed_gate_is_not_to_be_had() -> None:
    with pytest.raises(LookupError):
        _ = Gate[str]().value
