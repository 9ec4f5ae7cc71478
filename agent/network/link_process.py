"""The process that sets up network interfaces (links.py), as the agent has it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import attrs
import trio

from agent.errors import AgentError
from agent.network.links import Order
from protocol.errors import ErrorCode

# Under emulation the import alone takes seconds.
LIMIT_S = 60

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv.pop(1).split(':'); "
    "from agent.network.links import main; main()"
)


@attrs.frozen
class Done:
    """The interface's name, and what of an order could not be done, a sentence each."""

    interface: str
    problems: tuple[str, ...]


class Links:
    """The process, as the agent has it; made by ``open_links``."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders = process.stdin
        self._answers = process.stdout

    async def carry_out(self, order: Order) -> Done:
        """Give the interface what it is to have.

        Raises:
            AgentError: INTERNAL_ERROR: there is no interface; or the process is gone.
        """
        interface, *problems = await self._ask(f"set {order.line()}")
        if not interface:
            raise AgentError(ErrorCode.INTERNAL_ERROR, problems[0])
        return Done(interface, tuple(problems))

    async def settle(self, interface: str) -> tuple[str, ...]:
        """Wait until it is known whether the interface's IPv6 addresses are its own (RFC 4862).

        What is wrong with them, a sentence each.

        Raises:
            AgentError: INTERNAL_ERROR: the process is gone.
        """
        _, *problems = await self._ask(f"settle {interface}")
        return tuple(problems)

    async def _ask(self, order: str) -> list[str]:
        answer = b""
        with trio.move_on_after(LIMIT_S), suppress(trio.BrokenResourceError):
            await self._orders.send_all(f"{order}\n".encode())
            while not answer.endswith(b"\n"):
                received = await self._answers.receive_some()
                if not received:
                    break
                answer += received
        if not answer.endswith(b"\n"):
            # What it died of it has told the console.
            raise AgentError(
                ErrorCode.INTERNAL_ERROR, "the process that sets up interfaces gave no answer"
            )
        return answer.decode().rstrip("\n").split("\t")


@asynccontextmanager
async def open_links() -> AsyncIterator[Links]:
    """The process, for the block. Raises OSError: it cannot be started."""
    found_in = ":".join(filter(None, sys.path))
    process = await trio.lowlevel.open_process(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, found_in],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Links(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                await stream.aclose()
