"""Asking a machine for the usual things, and learning when processes there have ended."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from attrs import frozen

from protocol import AgentRequest, requests, responses
from protocol.client import AgentClient, open_client


async def execute(client: AgentClient, *command: str, **fields: Any) -> responses.Completed:
    """Run a command in the machine to its end, whatever its exit code."""
    answer = await client.request(requests.VmExec(command=command, **fields))
    assert isinstance(answer, responses.Completed), answer
    return answer


async def shell(client: AgentClient, script: str) -> str:
    """What a shell script in the machine prints; it must succeed."""
    done = await execute(client, "/bin/sh", "-c", script)
    assert done.exit_code == 0, (script, done.exit_code, done.stdout, done.stderr)
    return done.stdout.decode()


async def run(client: AgentClient, image: str, *command: str, **fields: Any) -> responses.Completed:
    """Run a command in a container to its end, whatever its exit code."""
    answer = await client.request(requests.Run(image=image, command=command, **fields))
    assert isinstance(answer, responses.Completed), answer
    return answer


async def pull(client: AgentClient, reference: str) -> dict[str, Any]:
    """Pull an image, which must succeed; its ImageInfo as it came."""
    answer = await client.request(requests.Pull(image=reference))
    assert isinstance(answer, responses.Ok), answer
    assert isinstance(answer.data, dict)
    return answer.data


async def refusal(client: AgentClient, request: AgentRequest) -> responses.Error:
    """The error that a request must end in."""
    answer = await client.request(request)
    assert isinstance(answer, responses.Error), answer
    return answer


@frozen
class Lifeline:
    """A FIFO in the machine that a process tree holds open: it ends when the last of them does."""

    _directory: str
    _started: trio.Event
    _ended: trio.Event

    def script(self, then: str) -> str:
        """A shell script that takes hold of the lifeline, says so, and goes on with `then`."""
        return f"exec 9>{self._directory}/life; echo up >{self._directory}/up; {then}"

    async def started(self) -> None:
        """Wait until the script runs."""
        await self._started.wait()

    async def ended(self) -> None:
        """Wait until no process of the tree is left."""
        await self._ended.wait()


@asynccontextmanager
async def lifeline(
    address: str, parent: str = "/tmp", seen_as: str | None = None
) -> AsyncIterator[Lifeline]:
    """A lifeline in a new directory of the machine below `parent`; gone after the block.

    `seen_as` is what the script calls `parent`, where it runs in a container.
    """
    async with (
        open_client(address) as first,
        open_client(address) as second,
        trio.open_nursery() as nursery,
    ):
        directory = (await shell(first, f"mktemp -d {parent}/lifeline.XXXXXX")).strip()
        await shell(first, f"chmod 755 {directory}; mkfifo -m 666 {directory}/life {directory}/up")
        line = Lifeline(directory.replace(parent, seen_as or parent, 1), trio.Event(), trio.Event())

        async def wait_for_end(client: AgentClient, name: str, event: trio.Event) -> None:
            # Opening blocks until the script opens the other end, reading until nobody holds it.
            await shell(client, f"cat {directory}/{name}")
            event.set()

        nursery.start_soon(wait_for_end, first, "up", line._started)
        nursery.start_soon(wait_for_end, second, "life", line._ended)
        yield line
        nursery.cancel_scope.cancel()
    async with open_client(address) as client:
        await shell(client, f"rm -r {directory}")
