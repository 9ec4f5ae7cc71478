"""Interactive requests, spoken to step by step."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import trio

from protocol import AgentResponse, requests, responses
from protocol.client import AgentClient, Answers, open_client

PATIENCE_S = 20

# A shell command: writes until nobody has taken any of it for 0.3 s, and notes how much it was.
FILL = """python3 -c '
import os, select
os.set_blocking(1, False)
count = 0
while select.select([], [1], [], 0.3)[1]:
    count += os.write(1, b"x" * 1000)
open("/tmp/written", "w").write(str(count))
'"""


class Session:
    """One interactive command: what it has said so far, and what it is told."""

    def __init__(self, client: AgentClient, answers: Answers) -> None:
        self._client = client
        self._answers = answers
        self.stdout = b""
        self.stderr = b""

    async def started(self) -> None:
        """Take the first answer, which must say that the command runs."""
        with trio.fail_after(PATIENCE_S):
            answer = await self._answers.__anext__()
        assert answer == responses.Started(), answer

    async def send(self, data: bytes | str) -> None:
        """Input; none is its end."""
        await self._client.send(requests.Stdin(data.encode() if isinstance(data, str) else data))

    async def resize(self, columns: int, rows: int) -> None:
        await self._client.send(requests.Resize(columns, rows))

    async def see(self, text: bytes) -> None:
        """Wait until the output holds `text`; what comes up to it is dropped."""
        while text not in self.stdout:
            await self._take_one()
        self.stdout = self.stdout.partition(text)[2]

    async def see_error(self, text: bytes) -> None:
        """The same, of what comes on stderr."""
        while text not in self.stderr:
            await self._take_one()
        self.stderr = self.stderr.partition(text)[2]

    async def exited(self) -> responses.Exited:
        """Take all answers up to the last one, which must be the command's end."""
        with trio.fail_after(PATIENCE_S):
            async for answer in self._answers:
                if not self._take(answer):
                    assert isinstance(answer, responses.Exited), answer
                    return answer
        raise AssertionError("the answers ended before the command")

    async def _take_one(self) -> None:
        with trio.fail_after(PATIENCE_S):
            answer = await self._answers.__anext__()
        assert self._take(answer), (answer, self.stdout, self.stderr)

    def _take(self, answer: AgentResponse) -> bool:
        if isinstance(answer, responses.Stdout):
            self.stdout += answer.data
        elif isinstance(answer, responses.Stderr):
            self.stderr += answer.data
        else:
            return False
        return True


@asynccontextmanager
async def session(address: str, request: requests.Run | requests.VmExec) -> AsyncIterator[Session]:
    """The request's command, which has started, over a connection that ends with the block."""
    async with open_client(address) as client, client.stream(request) as answers:
        talk = Session(client, answers)
        await talk.started()
        yield talk


async def answers_to(client: AgentClient, request: requests.Run | requests.VmExec) -> list[Any]:
    """All answers to a request that nobody types to, from the first to the last."""
    with trio.fail_after(PATIENCE_S):
        async with client.stream(request) as answers:
            return [answer async for answer in answers]


def stdout_in(answers: Iterable[Any]) -> bytes:
    """The output among answers, in one piece."""
    return b"".join(answer.data for answer in answers if isinstance(answer, responses.Stdout))
