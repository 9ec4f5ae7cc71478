"""What requests that run a command have in common: how they run, and what is answered."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial

import trio

from agent.channel import Channel
from agent.processes.attach import attach
from agent.processes.collect import Collected
from agent.processes.outcome import Outcome
from agent.processes.process import Process, Stream
from agent.processes.terminal import Size
from protocol import requests, responses

log = logging.getLogger(__name__)

_ANSWERS: Mapping[Stream, type[responses.Stdout | responses.Stderr]] = {
    Stream.STDOUT: responses.Stdout,
    Stream.STDERR: responses.Stderr,
}


class Mode(Enum):
    """How a command is run; where a request sets several, the first of these holds."""

    INTERACTIVE = auto()
    DETACHED = auto()
    BACKGROUND = auto()
    PLAIN = auto()

    @classmethod
    def of(cls, request: requests.VmExec | requests.Run) -> Mode:
        if request.interactive or request.tty:
            return cls.INTERACTIVE
        if isinstance(request, requests.Run) and request.detached:
            return cls.DETACHED
        return cls.BACKGROUND if request.background else cls.PLAIN


async def converse(
    request: requests.VmExec | requests.Run,
    channel: Channel,
    process: Process,
    started: Callable[[], Awaitable[None]] | None = None,
) -> responses.Exited:
    """Have an interactive session with a process, from ``started`` to its end.

    ``started`` waits until the command itself is about to run, where that is not the process yet;
    what it raises comes before any answer.
    """
    timeout_s = seconds(request.timeout_ms)
    asked_at = trio.current_time()
    if started is not None:
        with trio.move_on_after(float("inf") if timeout_s is None else timeout_s):
            await started()
    if timeout_s is not None:
        timeout_s = max(0.0, timeout_s - (trio.current_time() - asked_at))
    with a_cancellation_is_all():
        outcome = await attach(
            process,
            partial(_send, channel),
            partial(_receive, channel),
            begin=partial(channel.send, responses.Started()),
            stdin_data=request.stdin_data,
            timeout_s=timeout_s,
        )
    return exited(outcome)


@contextmanager
def a_cancellation_is_all() -> Iterator[None]:
    """Let nothing pass beside a cancellation: the peer has hung up, so whoever was sending or
    receiving at that moment failed as well, and nobody is left to be told."""
    try:
        yield
    except BaseExceptionGroup as group:
        cancellations, failures = group.split(trio.Cancelled)
        if cancellations is None or not isinstance(failures, ExceptionGroup):
            raise
        log.debug("cancelled, and meanwhile: %r", failures)
        raise cancellations from None


async def _send(channel: Channel, stream: Stream, data: bytes) -> None:
    await channel.send(_ANSWERS[stream](data))


async def _receive(channel: Channel) -> bytes | Size | None:
    message: requests.Stdin | requests.Resize | None
    message = await channel.follow_up(requests.Stdin, requests.Resize)
    if isinstance(message, requests.Resize):
        return Size(message.cols, message.rows)
    return None if message is None else message.data


def seconds(timeout_ms: int | None) -> float | None:
    """A time limit as trio takes it; None is none."""
    return None if timeout_ms is None else timeout_ms / 1000


def completed(collected: Collected) -> responses.Completed:
    """The answer to a plain run."""
    outcome = collected.outcome
    return responses.Completed(
        exit_code=outcome.exit_code,
        stdout=collected.stdout,
        stderr=collected.stderr,
        stdout_truncated=collected.stdout_truncated,
        stderr_truncated=collected.stderr_truncated,
        oom=outcome.oom or None,
        signal=outcome.signal,
        timed_out=outcome.timed_out,
        duration_ms=outcome.duration_ms,
        cpu_us=outcome.cpu_us,
        peak_memory_bytes=outcome.peak_memory_bytes,
    )


def exited(outcome: Outcome) -> responses.Exited:
    """The end of an interactive run."""
    return responses.Exited(
        exit_code=outcome.exit_code,
        oom=outcome.oom or None,
        signal=outcome.signal,
        timed_out=outcome.timed_out,
        duration_ms=outcome.duration_ms,
        cpu_us=outcome.cpu_us,
        peak_memory_bytes=outcome.peak_memory_bytes,
    )


def running_as(name: str | int) -> responses.Completed:
    """The answer to what goes on without its request: its pid, or its container's id."""
    return responses.Completed(exit_code=0, stdout=str(name).encode("ascii"), stderr=b"")
