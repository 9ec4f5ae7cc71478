"""Plain runs: a command to its end, and all of its output in one piece."""

from __future__ import annotations

import math

import attrs
import trio

from agent.processes.drain import Drain
from agent.processes.outcome import TIMED_OUT, Outcome
from agent.processes.pipes import InputPipe, OutputPipe
from agent.processes.process import Process, Stream

OUTPUT_LIMIT_BYTES = 11 * 1024 * 1024
"""Of each stream: two of them in base64 are what fits into one frame."""


@attrs.frozen
class Collected:
    """How a command ended and what it wrote, as bytes."""

    outcome: Outcome
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool = False
    stderr_truncated: bool = False

    @property
    def exit_code(self) -> int:
        return self.outcome.exit_code


@attrs.define
class _Head:
    """The first bytes of a stream, and the count of all."""

    limit_bytes: int
    total_bytes: int = 0
    kept: bytearray = attrs.field(factory=bytearray)

    def take(self, data: bytes) -> None:
        room = self.limit_bytes - self.total_bytes
        self.total_bytes += len(data)
        if room > 0:
            self.kept += data if len(data) <= room else data[:room]

    @property
    def is_truncated(self) -> bool:
        return self.total_bytes > self.limit_bytes


async def collect(
    process: Process,
    *,
    stdin_data: str | None = None,
    timeout_s: float | None = None,
    output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
) -> Collected:
    """Feed ``stdin_data`` to a process, gather its output, and wait for its end.

    The process's end decides: processes that it leaves behind with its pipes open delay the
    result by no more than 100 ms, and keep the pipes. After ``timeout_s`` seconds (0: at once)
    the whole tree is killed and the exit code is ``TIMED_OUT``. Of a stream longer than the limit
    the beginning is kept, and the rest read and dropped; the end of ``stderr`` says so.

    Cancelled, it kills nothing: that is for whoever started the process.
    """
    stdout, stderr = heads = _Head(output_limit_bytes), _Head(output_limit_bytes)
    drain = Drain(process.turns)
    streams = list(zip(map(process.outputs.__getitem__, Stream), heads, strict=True))
    if process.has_ended and process.stdin is None:
        # It is over before anybody had to listen, and nobody has to now: what it wrote is there.
        outcome = await see_to_end(process, None)
        drain.begin()
        for pipe, head in streams:
            await _gather(drain, pipe, head)
        return _collected(outcome, stdout, stderr)
    async with trio.open_nursery() as reading, trio.open_nursery() as feeding:
        if process.stdin is not None:
            feeding.start_soon(feed, process.stdin, (stdin_data or "").encode())
        for pipe, head in streams:
            reading.start_soon(_gather, drain, pipe, head)
        outcome = await see_to_end(process, timeout_s)
        drain.begin()
        feeding.cancel_scope.cancel()
    return _collected(outcome, stdout, stderr)


def _collected(outcome: Outcome, stdout: _Head, stderr: _Head) -> Collected:
    return Collected(
        outcome=outcome,
        stdout=bytes(stdout.kept),
        stderr=bytes(stderr.kept) + _marks(stdout, stderr),
        stdout_truncated=stdout.is_truncated,
        stderr_truncated=stderr.is_truncated,
    )


async def see_to_end(process: Process, timeout_s: float | None) -> Outcome:
    """Wait for a process's end, or bring it about, with its whole tree, after its time limit."""
    with trio.move_on_after(math.inf if timeout_s is None else timeout_s) as limit:
        await process.wait()
    if limit.cancelled_caught:
        await process.end_tree()
        if process.exit_code is None:
            # Stuck in the kernel; it will not run another instruction.
            return Outcome(exit_code=TIMED_OUT, timed_out=True)
    return process.outcome(timed_out=limit.cancelled_caught)


async def feed(stdin: InputPipe, data: bytes) -> None:
    """All that a command gets to read."""
    await stdin.send(data)
    await stdin.end()


async def _gather(drain: Drain, pipe: OutputPipe, head: _Head) -> None:
    while data := await drain.receive(pipe):
        head.take(data)


def _marks(stdout: _Head, stderr: _Head) -> bytes:
    """Lines to end stderr with: what is missing of either stream."""
    lines = [
        f"innkeep: {name} truncated to {head.limit_bytes} of {head.total_bytes} bytes\n"
        for name, head in (("stdout", stdout), ("stderr", stderr))
        if head.is_truncated
    ]
    if lines and stderr.kept and not stderr.kept.endswith(b"\n"):
        lines.insert(0, "\n")
    return "".join(lines).encode()
