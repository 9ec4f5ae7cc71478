"""The host's doorbell, and what the log says of the boot."""

import json
import os
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.doorbell import READY_PORT
from protocol import requests, responses
from protocol.client import open_client
from tests.support.execution import execute
from tests.support.host_ports import HostPorts
from tests.support.machine import Machine, booted
from tests.support.watch import until

STEPS = (
    "agent",
    "listening",
    "config",
    "serving",
    "services",
    "storage",
    "network",
    "doorbell",
)


@asynccontextmanager
async def machine_with_a_doorbell(
    directory: Path, options: Sequence[str] = ()
) -> AsyncIterator[tuple[Machine, trio.SocketListener]]:
    ports = HostPorts(directory / "agent.sock")
    with ExitStack() as stack:
        async with ports.listening(READY_PORT) as doorbell:
            boot = partial(stack.enter_context, booted(directory, options=options))
            machine = await trio.to_thread.run_sync(boot)
            yield machine, doorbell
            await trio.to_thread.run_sync(stack.close)


async def told(machine: Machine) -> str:
    """What the log says when the machine is ready."""
    await until(lambda: '"ready ' in machine.console_text(), machine.console)
    for line in machine.console_text().splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry["msg"].startswith("ready "):
                return str(entry["msg"])
    raise AssertionError(machine.console_text())


async def test_it_rings_once_when_storage_and_network_are_up(tmp_path: Path) -> None:
    async with machine_with_a_doorbell(tmp_path) as (machine, doorbell):
        with trio.fail_after(20):
            async with await doorbell.accept() as ring:
                assert await ring.receive_some() == b""
        # Not before: both have been told of by then.
        match = re.fullmatch(r"ready ([\d.]+) s after boot \((.*)\)", await told(machine))
        assert match is not None
        steps = dict(step.split(" ") for step in match[2].split(", "))
        assert tuple(steps) == STEPS
        at_s = {step: float(text) for step, text in steps.items()}
        one_by_one = [at_s[step] for step in STEPS[:5]]
        # The first is known to a hundredth.
        assert one_by_one[1:] == sorted(one_by_one[1:])
        assert at_s["agent"] <= at_s["listening"] + 0.01
        # These two go on beside the imports of the services' handlers.
        for step in ("storage", "network"):
            assert at_s["serving"] < at_s[step] <= at_s["doorbell"]
        assert at_s["doorbell"] == float(match[1])
        async with open_client(machine.address) as client:
            await client.request(requests.Shutdown())
        assert await trio.to_thread.run_sync(machine.wait) == 0
        with (
            socket.socket(fileno=os.dup(doorbell.socket.fileno())) as plain,
            pytest.raises(BlockingIOError),
        ):
            plain.accept()


async def test_storage_that_cannot_be_had_does_not_keep_it_from_ringing(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "oci").write_text("in the way")
    async with machine_with_a_doorbell(tmp_path) as (machine, doorbell):
        with trio.fail_after(20):
            await (await doorbell.accept()).aclose()
        async with open_client(machine.address) as client:
            answer = await client.request(requests.StorageStatus())
            assert isinstance(answer, responses.Ok)
            assert isinstance(answer.data, dict)
            assert answer.data["ready"] is False


async def test_nobody_at_the_door_is_fine(machine: Machine) -> None:
    assert await told(machine)
    async with open_client(machine.address) as client:
        assert (await execute(client, "true")).exit_code == 0
