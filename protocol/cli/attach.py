"""An interactive command in the VM, its streams joined to our own."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from typing import Final, TextIO

import trio

from protocol import requests, responses
from protocol.cli import terminal
from protocol.cli.connection import CommandFailed
from protocol.client import AgentClient, Answers, ConnectionFailed, expect

_CHUNK_SIZE: Final = 64 * 1024
_STREAM_FAILED: Final = 1


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
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_forward_input, client, source)
            if size_changes is not None:
                nursery.start_soon(_forward_sizes, client, size_changes)
            async for answer in answers:
                match answer:
                    case responses.Stdout(data):
                        await _write(sys.stdout, data)
                    case responses.Stderr(data):
                        await _write(sys.stderr, data)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The first is what ended the session, and what our callers know how to report.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__
    return expect(answer, responses.Exited)


# An interrupt is for the session. In the middle of a send it would be lost: the connection is
# closed then, for which the session ends, for which the sender is cancelled.
@trio.lowlevel.enable_ki_protection
async def _forward_input(client: AgentClient, source: TextIO | None) -> None:
    # What the agent said before it hung up is still to be read, and says more than this would.
    with suppress(ConnectionFailed):
        # An input that was closed before we started is None as well.
        while source is not None and (data := await _read(source.fileno())):
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


async def _read(fd: int) -> bytes:
    """Some bytes, or none at the end. What is not read when cancelled is left to others.

    The descriptor is not made non-blocking: it is shared with whoever started us.
    """
    try:
        while True:
            # Nobody waits for a file, or for a device like /dev/null: EPERM, see epoll_ctl(2).
            with suppress(PermissionError):
                await trio.lowlevel.wait_readable(fd)
            try:
                # In a thread, since others may have read what was there.
                return await trio.to_thread.run_sync(
                    os.read, fd, _CHUNK_SIZE, abandon_on_cancel=True
                )
            except BlockingIOError:
                continue
    except OSError as error:
        cause = error.strerror or error
        raise CommandFailed(f"cannot read the input: {cause}", _STREAM_FAILED) from error


async def _write(stream: TextIO | None, data: bytes) -> None:
    """Write all of it, around the stream's buffer; to a stream that was closed before, nothing.

    In a thread: a reader that stalls holds up neither our input nor a signal.
    """
    if stream is None:
        return
    fd = stream.fileno()
    left = memoryview(data)
    try:
        while left:
            try:
                count = await trio.to_thread.run_sync(os.write, fd, left, abandon_on_cancel=True)
                left = left[count:]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(fd)
    except BrokenPipeError:
        raise
    except OSError as error:
        cause = error.strerror or error
        raise CommandFailed(f"cannot write the output: {cause}", _STREAM_FAILED) from error
