"""The agent's sudden death, and its successor's start."""

import os
import signal
from collections.abc import Awaitable, Callable

from tests.support.machine import Machine
from tests.support.watch import until

SERVING = "serving on"


async def kill_agent(machine: Machine) -> None:
    """kill -9, and wait until its successor serves."""
    serving = successor(machine)
    os.kill(machine.agent_pid(), signal.SIGKILL)
    await serving()


def successor(machine: Machine) -> Callable[[], Awaitable[None]]:
    """Take note of the agent that serves now; to be called to wait until the next one does."""
    served = machine.console_text().count(SERVING)

    async def serving() -> None:
        await until(lambda: machine.console_text().count(SERVING) > served, machine.console, 60)

    return serving
