"""The beginning of every connection: the token, in time, or nothing."""

from __future__ import annotations

import logging

import trio

from agent.connection import Connection
from agent.errors import AgentError
from agent.gate import Gate
from agent.workload.token import MOST_CHARACTERS
from agent.workload_sessions.opening import Workload
from protocol import HostMessage, decode, encode, workload
from protocol.constants import MAX_FRAME_SIZE, PROTOCOL_VERSION
from protocol.errors import ErrorCode, FrameTooLarge, MalformedMessage

log = logging.getLogger(__name__)

AUTH_WITHIN_S = 5.0
# Nobody who has no token gets more memory than one takes, with JSON's escapes.
_FRAME_BYTES = 6 * MOST_CHARACTERS + 256
# How long a peer that is refused is heard out, and how much, so that it learns of it.
_FAREWELL_S = 1.0
_FAREWELL_BYTES = 64 * 1024 * 1024

# What is no message at all, or comes too late.
_WRONG = object()


async def authenticated(
    connection: Connection, gate: Gate[Workload]
) -> tuple[Workload, workload.Auth] | None:
    """What the peer may use from now on, and what it said; None for one that is refused.

    That has been told so.

    Raises:
        PeerGone: the connection broke.
    """
    try:
        shared = await gate.passed(ErrorCode.INTERNAL_ERROR)
    except AgentError:
        # Why there is nothing to let in to is in the agent's log.
        await refuse(connection)
        return None
    attempts = shared.attempts
    if not attempts.are_exhausted():
        connection.limit_frames(_FRAME_BYTES)
        first = _WRONG
        with trio.move_on_after(AUTH_WITHIN_S):
            first = await _first_message(connection)
        token = await shared.token.passed(ErrorCode.INTERNAL_ERROR)
        # Others may have guessed meanwhile.
        if not attempts.are_exhausted():
            if isinstance(first, workload.Auth):
                is_right = token.matches(first.token)
                if is_right and first.protocol_version == PROTOCOL_VERSION:
                    connection.limit_frames(MAX_FRAME_SIZE)
                    return shared, first
            if first is not None:
                attempts.count_failure()
                log.warning("a connection to the workload's ports was not authenticated")
    await refuse(connection)
    return None


async def _first_message(connection: Connection) -> object | None:
    """What the peer says first, whatever that is; None if it leaves without a word."""
    try:
        payload = await connection.receive()
        if payload is None:
            return _WRONG if connection.is_amid_frame() else None
        message: HostMessage = decode(payload, HostMessage).body
    except (FrameTooLarge, MalformedMessage):
        return _WRONG
    return message


async def refuse(connection: Connection) -> None:
    """Tell a peer that it is not authenticated, and nothing else; the caller closes.

    Raises:
        PeerGone: there is nobody to tell.
    """
    await connection.send(encode(workload.AuthFailed()))
    await connection.hear_out(_FAREWELL_S, _FAREWELL_BYTES)
