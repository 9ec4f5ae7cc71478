"""Plain runs: a command to its end, and all of its output in one piece."""

from __future__ import annotations

import math
from contextlib import suppress

import attrs
import trio

from agent.processes.pipes import OutputPipe
from agent.processes.process import Process

TIMED_OUT = 124
"""The exit code of a command that its time limit ended, as timeout(1) has it."""

OUTPUT_LIMIT_BYTES = 11 * 1024 * 1024
"""Of each stream: two of them in base64 are what fits into one frame."""

# How long output may still come after the command's end, from what it left running. Hosts are
# promised 100 ms in all.
_DRAIN_S = 0.08


@attrs.frozen
class Collected:
    """How a command ended and what it wrote, as bytes."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    timed_out: bool = False


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
    stdout, stderr = _Head(output_limit_bytes), _Head(output_limit_bytes)
    async with trio.open_nursery() as reading, trio.open_nursery() as feeding:
        if process.stdin is not None:
            feeding.start_soon(_feed, process.stdin, (stdin_data or "").encode())
        reading.start_soon(_gather, process.stdout, stdout)
        reading.start_soon(_gather, process.stderr, stderr)
        exit_code = TIMED_OUT
        with trio.move_on_after(math.inf if timeout_s is None else timeout_s) as limit:
            exit_code = await process.wait()
        if limit.cancelled_caught:
            await process.end_tree()
        feeding.cancel_scope.cancel()
        reading.cancel_scope.deadline = trio.current_time() + _DRAIN_S
    return Collected(
        exit_code=exit_code,
        stdout=bytes(stdout.kept),
        stderr=bytes(stderr.kept) + _marks(stdout, stderr),
        stdout_truncated=stdout.is_truncated,
        stderr_truncated=stderr.is_truncated,
        timed_out=limit.cancelled_caught,
    )


async def _feed(stdin: trio.lowlevel.FdStream, data: bytes) -> None:
    # A command that does not read all of it is in its right, as in a shell's pipe.
    with suppress(trio.BrokenResourceError):
        await stdin.send_all(data)
    await stdin.aclose()


async def _gather(pipe: OutputPipe, head: _Head) -> None:
    while data := await pipe.receive():
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
