"""One connection's conversation: read a request, have it answered, send the answer, again."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import trio

from agent import logs
from agent.channel import Channel, Request
from agent.connection import Connection, PeerGone
from agent.errors import AgentError
from agent.gate import Gate
from agent.hangup import HangupWatch
from protocol import AgentRequest, AgentResponse, requests, responses
from protocol.constants import PROTOCOL_VERSION
from protocol.errors import ErrorCode, FrameTooLarge, MalformedMessage

if TYPE_CHECKING:
    from agent.services import Services

log = logging.getLogger(__name__)

# How long, and for how many bytes, a peer that sent an oversize frame is heard out, so that the
# answer is not lost to the reset that closing on unread bytes causes.
FAREWELL_S = 1.0
FAREWELL_BYTES = 64 * 1024 * 1024

# What ends well and soon is not worth a line: a serial console takes longer for it than most
# requests take.
SLOW_S = 1.0

DROPPED: frozenset[type] = frozenset({requests.Stdin, requests.Resize})
"""Follow-ups that get no answer, and so are dropped where no session takes them."""

OUTLIVE_THEIR_CONNECTION: frozenset[type] = frozenset({requests.Shutdown, requests.FormatStorage})
"""Requests that run to their end when the peer hangs up, and even if it has already."""

CAPABILITIES = (
    "process-stats-v1",
    "pull-plan-v1",
    "pull-progress-v1",
    "file-range-v1",
    "file-digest-v1",
    "file-resume-v1",
    "file-mtime-v1",
    "file-tree-v1",
    "tar-stream-v1",
    "vm-stats-v1",
    "diagnose-v1",
    "resumed-v1",
)
"""What this agent can do beyond protocol.rs; docs/protocol.md says what each one means."""


def pong(config_errors: Sequence[str] = ()) -> responses.Pong:
    """What every ping is answered with."""
    return responses.Pong(
        version=PROTOCOL_VERSION, capabilities=CAPABILITIES, config_errors=tuple(config_errors)
    )


Failure = TypeVar("Failure", bound=Exception)


async def converse(
    connection: Connection, hangups: HangupWatch, services: Gate[Services], pong: responses.Pong
) -> None:
    """Serve one connection until its peer is done or gone. The caller closes it.

    A hang-up cancels what the connection was doing. Of the requests that still lie unread then,
    only those are carried out that outlive their connection: a host that sends ``shutdown`` and
    leaves at once still gets its shutdown.
    """
    channel = Channel(connection)
    with trio.CancelScope() as conversation:
        try:
            with hangups.watching(connection.socket, conversation.cancel):
                await _answer_requests(channel, services, pong)
        except FrameTooLarge as error:
            refusal = responses.Error(message=str(error), code=ErrorCode.MESSAGE_TOO_LARGE.value)
            await channel.send(refusal)
            await connection.hear_out(FAREWELL_S, FAREWELL_BYTES)
        except PeerGone as error:
            log.debug("the peer is gone: %s", error)
            conversation.cancel()
    if conversation.cancel_called:
        await _carry_out_the_rest(channel, services, pong)


async def _answer_requests(
    channel: Channel, services: Gate[Services], pong: responses.Pong
) -> None:
    while True:
        try:
            envelope = await channel.next_request()
        except MalformedMessage as error:
            await channel.send(
                responses.Error(message=str(error), code=ErrorCode.INVALID_REQUEST.value)
            )
            continue
        if envelope is None:
            return
        await _answer(envelope, channel, services, pong)


async def _answer(
    envelope: Request, channel: Channel, services: Gate[Services], pong: responses.Pong
) -> None:
    request: AgentRequest = envelope.body
    kind = type(request)
    if kind is requests.Ping:
        # Hosts ask this most and wait for it least: it needs no service, also while there are
        # none yet, and leaves no line in the log.
        await channel.send(pong)
        return
    if kind in DROPPED:
        # Left over after its session's end: an answer would be taken for the next request's.
        return
    token = logs.trace_id.set(envelope.trace_id)
    try:
        if kind in OUTLIVE_THEIR_CONNECTION:
            with trio.CancelScope(shield=True):
                answer = await _handle(request, channel, services)
        else:
            answer = await _handle(request, channel, services)
        try:
            if answer is not None:
                await channel.send(answer)
        finally:
            channel.answered()
    finally:
        logs.trace_id.reset(token)


async def _handle(
    request: AgentRequest, channel: Channel, gate: Gate[Services]
) -> AgentResponse | None:
    """The final answer; None where the handler has given it already."""
    services = await gate.passed(ErrorCode.INTERNAL_ERROR)
    # Imported, with the services, while the first pings were answered.
    from agent.handlers import HANDLERS

    kind = type(request)
    handler = HANDLERS[kind]
    method = handler.__name__
    begun = time.monotonic()
    answer: AgentResponse | None
    try:
        services.refuse_new_work(kind)
        if kind is not requests.Resumed:
            services.resumer.look_for_pause()
        with services.work.under_way(kind) as work:
            answer = await handler(request, channel, services)
        if work.cancelled_caught:
            if channel.is_torn:
                raise PeerGone("the shutdown came in the middle of an answer")
            raise services.work.refusal()
    except Exception as error:
        for kind_of_end in (PeerGone, FrameTooLarge):
            end = _sole(kind_of_end, error)
            if end is not None:
                raise end from None
        refusal = _sole(AgentError, error)
        if refusal is None:
            log.exception("%s: internal error", method)
            refusal = AgentError(
                ErrorCode.INTERNAL_ERROR,
                f"{method}: internal error; the agent's log on the VM's console tells the cause",
            )
        answer = responses.Error(message=refusal.message, code=refusal.code.value)
    took_s = time.monotonic() - begun
    if isinstance(answer, responses.Error):
        values = (method, answer.code, answer.message, took_s * 1000)
        log.info("%s: %s: %s after %.1f ms", *values, extra=logs.FAILED_REQUEST)
    else:
        level = logging.INFO if took_s >= SLOW_S else logging.DEBUG
        log.log(level, "%s: done after %.1f ms", method, took_s * 1000)
    return answer


def _sole(kind: type[Failure], error: BaseException) -> Failure | None:
    """``error`` itself, or the first of a group of nothing else, as nurseries make them."""
    while isinstance(error, BaseExceptionGroup):
        if error.split(kind)[1] is not None:
            return None
        error = error.exceptions[0]
    return error if isinstance(error, kind) else None


async def _carry_out_the_rest(
    channel: Channel, services: Gate[Services], pong: responses.Pong
) -> None:
    with trio.CancelScope(shield=True):
        while (envelope := channel.pending_request()) is not None:
            if type(envelope.body) in OUTLIVE_THEIR_CONNECTION:
                try:
                    await _answer(envelope, channel, services, pong)
                except PeerGone:
                    log.debug("nobody was left to hear the answer")
