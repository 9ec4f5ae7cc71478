"""Interactive commands: what an agent says and hears while one runs, and who asks for it."""

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from protocol import AgentRequest, AgentResponse, requests, responses
from tests.protocol.command_line import PROJECT, with_answers
from tests.protocol.fake_agent import Answers, Conversation, Peer, serving

DONE: list[AgentResponse] = [
    responses.Started(),
    responses.Stdout(b"out\n"),
    responses.Exited(0),
]
CHUNK_SIZE = 64 * 1024


async def with_session(
    path: Path, answers: Answers, *arguments: str, **env: str
) -> tuple[Any, list[AgentRequest]]:
    """Run `innkeep` against an agent that gives fixed answers; its result, and what it asked.

    Input and sizes are not among what it asked.
    """
    follow_ups: Answers = {requests.Stdin: [[]], requests.Resize: [[]]}
    result, asked = await with_answers(path, {**answers, **follow_ups}, *arguments, **env)
    return result, [request for request in asked if type(request) not in follow_ups]


async def in_conversation(
    path: Path, conversation: Conversation, *arguments: str, **options: Any
) -> Any:
    """Run `innkeep` to its end against an agent; `options` are those of `trio.run_process`."""
    async with serving(path, conversation) as address:
        return await run_innkeep(address, *arguments, **options)


async def run_innkeep(address: str, *arguments: str, **options: Any) -> Any:
    """Run `innkeep` to its end; `options` are those of `trio.run_process`."""
    captured = {"capture_stdout": "stdout" not in options, "capture_stderr": True}
    return await trio.run_process(
        command(address, *arguments), check=False, cwd=PROJECT, **captured, **options
    )


async def start_innkeep(address: str, *arguments: str, **options: Any) -> trio.Process:
    """Start `innkeep`; `options` are those of `trio.lowlevel.open_process`."""
    return await trio.lowlevel.open_process(command(address, *arguments), cwd=PROJECT, **options)


def command(address: str, *arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "protocol.cli", "--connect", address, *arguments]


async def begin(peer: Peer) -> AgentRequest | None:
    """Hear a request, and say that it runs."""
    request = await peer.receive()
    await peer.send(responses.Started())
    return request


def session(*answers: AgentResponse) -> Conversation:
    """The agent of a command that starts and gives its answers once its input has ended."""

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await all_input(peer)
        await peer.send(*answers)

    return conversation


async def all_input(peer: Peer, take: Callable[[bytes], Awaitable[None]] | None = None) -> bytes:
    """What the command gets until its input ends; `take` sees each piece."""
    received = bytearray()
    while isinstance(message := await peer.receive(), requests.Stdin) and message.data:
        assert len(message.data) <= CHUNK_SIZE
        received += message.data
        if take is not None:
            await take(message.data)
    assert message == requests.Stdin(b"")
    return bytes(received)


async def some_input(peer: Peer, size: int) -> bytes:
    """The next bytes of the command's input, in as many pieces as they come."""
    received = b""
    while len(received) < size:
        message = await peer.receive()
        assert isinstance(message, requests.Stdin)
        assert message.data
        received += message.data
    return received


def pattern(size: int) -> bytes:
    """Bytes of every value, no two blocks of 1024 alike."""
    block = bytes(range(256)) * 4
    return b"".join(b"%08d" % n + block[8:] for n in range(-(-size // 1024)))[:size]


def offset(fd: int) -> int:
    """How far a file has been read, by all who share the open file."""
    return os.lseek(fd, 0, os.SEEK_CUR)
