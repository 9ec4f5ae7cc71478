"""The agent's sudden death, and its successor's start."""

import os
import signal
from collections.abc import Awaitable, Callable

import pytest

from protocol.client import AgentClient, ConnectionFailed, open_client
from tests.support.execution import execute
from tests.support.machine import Machine
from tests.support.watch import until

SERVING = "serving on"


async def kill_agent(machine: Machine) -> None:
    """kill -9, and wait until its successor serves; in a VM it is told to do it itself."""
    serving = successor(machine)
    if machine.is_vm:
        async with open_client(machine.address) as client:
            await kill_by(client)
    else:
        os.kill(machine.agent_pid(), signal.SIGKILL)
    await serving()


async def kill_by(client: AgentClient) -> None:
    """Have the agent of a VM killed by a command of its own, and the connection with it."""
    with pytest.raises(ConnectionFailed):
        await execute(client, "sh", "-c", "kill -9 $(cat /sys/fs/cgroup/agent/cgroup.procs)")


def successor(machine: Machine) -> Callable[[], Awaitable[None]]:
    """Take note of the agent that serves now; to be called to wait until the next one does."""
    served = machine.console_text().count(SERVING)

    async def serving() -> None:
        await until(lambda: machine.console_text().count(SERVING) > served, machine.console, 60)

    return serving
