"""Interactive runs: a command whose output goes out as it comes, and whose input comes in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from agent.processes.collect import see_to_end
from agent.processes.drain import Drain
from agent.processes.outcome import Outcome
from agent.processes.pipes import OutputPipe
from agent.processes.process import Process, Stream
from agent.processes.terminal import Size

Send = Callable[[Stream, bytes], Awaitable[None]]
"""Takes output, one chunk at a time; while it waits, the command waits with it."""

Room = Callable[[Stream], Awaitable[None]]
"""Returns when a chunk of a stream can be taken; none is read, and held in memory, before."""

Receive = Callable[[], Awaitable[bytes | Size | None]]
"""The next input (no bytes: its end), or the terminal's new size; None when no more comes. Safe to
cancel."""


async def attach(
    process: Process,
    send: Send,
    receive: Receive,
    *,
    begin: Callable[[], Awaitable[None]] | None = None,
    room: Room | None = None,
    stdin_data: str | None = None,
    timeout_s: float | None = None,
) -> Outcome:
    """Carry output and input of a process until its end, in both directions at once.

    ``begin`` tells the reader that it has begun, before there is any output. Output comes in
    chunks of at most 64 KiB, in the order of each stream; what the process leaves running with its
    pipes open delays the end by no more than 100 ms. ``stdin_data`` is read before any other
    input. A time limit holds also while ``begin`` or ``send`` waits for a reader that has stalled.
    Their errors and those of ``receive`` end it; neither they nor a cancellation kill anything:
    that is for whoever started the process.
    """
    drain = Drain(process.turns)

    async def receive_output(stream: Stream, pipe: OutputPipe) -> bytes:
        if room is not None:
            await room(stream)
        return await drain.receive(pipe)

    if process.has_ended:
        # It is over before anybody had to listen: what it wrote is there, and it reads no more.
        outcome = await see_to_end(process, None)
        drain.begin()
        if begin is not None:
            await begin()
        for stream, pipe in process.outputs.items():
            while data := await receive_output(stream, pipe):
                await send(stream, data)
        return outcome
    # To send; `begin` has it first.
    turn = trio.Semaphore(0 if begin is not None else 1)

    async def start(begin: Callable[[], Awaitable[None]]) -> None:
        try:
            await begin()
        finally:
            turn.release()

    async def forward(stream: Stream, pipe: OutputPipe) -> None:
        while data := await receive_output(stream, pipe):
            # Mostly there is one stream only, and then the turn costs nothing.
            try:
                turn.acquire_nowait()
            except trio.WouldBlock:
                await turn.acquire()
            try:
                await send(stream, data)
            finally:
                turn.release()
            # With two hundred commands that would be 25 MB, kept until there is more.
            del data

    async def feed() -> None:
        try:
            await _feed(process, receive, (stdin_data or "").encode())
        except Exception:
            # The reader may still be told why: behind the chunk that is being sent, not within it.
            async with turn:
                reading.cancel_scope.cancel()
                raise

    async with trio.open_nursery() as reading, trio.open_nursery() as feeding:
        if begin is not None:
            reading.start_soon(start, begin)
        feeding.start_soon(feed)
        for stream, pipe in process.outputs.items():
            reading.start_soon(partial(forward, stream, pipe))
        outcome = await see_to_end(process, timeout_s)
        drain.begin()
        # Whatever the peer sends from now on belongs to its next request.
        feeding.cancel_scope.cancel()
    return outcome


async def _feed(process: Process, receive: Receive, first: bytes) -> None:
    stdin, terminal = process.stdin, process.terminal
    if stdin is not None and first:
        await stdin.send(first)
    while (message := await receive()) is not None:
        if isinstance(message, Size):
            if terminal is not None:
                terminal.resize(message)
        elif stdin is not None:
            await (stdin.send(message) if message else stdin.end())
    # The peer has said its last word.
    if stdin is not None:
        await stdin.end()
