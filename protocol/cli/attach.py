"""An interactive command in the VM, its streams joined to our own."""

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from typing import TextIO

import trio

from protocol import requests, responses
from protocol.cli import terminal
from protocol.cli.connection import first_failure
from protocol.cli.streams import read_some, write_all
from protocol.client import AgentClient, Answers, ConnectionFailed, expect


async def attach(
    client: AgentClient, request: requests.Run | requests.VmExec, *, with_input: bool
) -> responses.Exited | responses.Error:
    """Run an interactive or tty command with our streams: its end, or why it never started.

    Without input the command's own is at its end at once. With input and ``request.tty`` our
    standard input must be a terminal, which is in raw mode while the command runs.

    Raises AgentRefused for an error after the start, BrokenPipeError when our reader is gone,
    CommandFailed when our streams fail otherwise, and what AgentClient raises.
    """
    # Open before the first size is sent, so that no change after it is missed.
    with trio.open_signal_receiver(signal.SIGWINCH) as size_changes:
        async with client.stream(request) as answers:
            if request.tty:
                await _send_size(client)
            first = await anext(answers)
            if isinstance(first, responses.Error):
                return first
            expect(first, responses.Started)
            source = sys.stdin if with_input else None
            is_raw = source is not None and request.tty
            with terminal.raw_mode(sys.stdin.fileno()) if is_raw else nullcontext():
                return await _joined(client, answers, source, size_changes if request.tty else None)


async def _joined(
    client: AgentClient,
    answers: Answers,
    source: TextIO | None,
    size_changes: AsyncIterator[int] | None,
) -> responses.Exited:
    with first_failure():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_forward_input, client, source)
            if size_changes is not None:
                nursery.start_soon(_forward_sizes, client, size_changes)
            async for answer in answers:
                match answer:
                    case responses.Stdout(data):
                        await write(sys.stdout, data)
                    case responses.Stderr(data):
                        await write(sys.stderr, data)
            nursery.cancel_scope.cancel()
    return expect(answer, responses.Exited)


# An interrupt is for the session. In the middle of a send it would be lost: the connection is
# closed then, for which the session ends, for which the sender is cancelled.
@trio.lowlevel.enable_ki_protection
async def _forward_input(client: AgentClient, source: TextIO | None) -> None:
    # What the agent said before it hung up is still to be read, and says more than this would.
    with suppress(ConnectionFailed):
        # An input that was closed before we started is None as well.
        while source is not None and (data := await read_some(source.fileno())):
            await client.send(requests.Stdin(data))
        await client.send(requests.Stdin(b""))


@trio.lowlevel.enable_ki_protection
async def _forward_sizes(client: AgentClient, changes: AsyncIterator[int]) -> None:
    async for _ in changes:
        await _send_size(client)


async def _send_size(client: AgentClient) -> None:
    if (size := terminal.size()) is not None:
        with suppress(ConnectionFailed):  # As above.
            await client.send(size)


async def write(stream: TextIO | None, data: bytes) -> None:
    """To a stream that was closed before we started, nothing."""
    if stream is not None:
        await write_all(stream.fileno(), data)
