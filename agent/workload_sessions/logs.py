"""The log port (5001): the workload's output, from what is kept on, to any number of readers."""

from __future__ import annotations

import logging

import trio

from agent.connection import Connection, PeerGone
from agent.errors import cause_of
from agent.gate import Gate
from agent.hangup import HangupWatch
from agent.workload_sessions.authentication import authenticated
from agent.workload_sessions.log_source import LogSource
from agent.workload_sessions.opening import Workload
from agent.workload_sessions.outgoing import Outgoing
from protocol import HostMessage, decode, request_id_of, workload
from protocol.errors import FrameTooLarge, MalformedMessage

log = logging.getLogger(__name__)

_FAREWELL_S = 1.0
_FAREWELL_BYTES = 64 * 1024 * 1024


async def serve_logs(connection: Connection, hangups: HangupWatch, gate: Gate[Workload]) -> None:
    """Serve one connection until its peer is gone; the caller closes it."""
    with trio.CancelScope() as conversation:
        try:
            with hangups.watching(connection.socket, conversation.cancel):
                admitted = await authenticated(connection, gate)
                if admitted is not None:
                    shared, auth = admitted
                    await _tell(connection, shared, follow=auth.follow)
        except* PeerGone as gone:
            log.debug("the peer is gone: %s", gone.exceptions[0])


async def _tell(connection: Connection, shared: Workload, *, follow: bool) -> None:
    outgoing = Outgoing(connection)
    async with trio.open_nursery() as sending:
        sending.start_soon(outgoing.run)
        outgoing.say(workload.AuthOk())
        try:
            source = LogSource.whole(shared.log, outgoing, follow=follow)
        except OSError as error:
            outgoing.say(workload.Error(message=f"read the workload's log: {cause_of(error)}"))
            await outgoing.told()
            sending.cancel_scope.cancel()
            return
        try:
            if not follow:
                await outgoing.flushed()
                sending.cancel_scope.cancel()
                return
            reason = await _read(connection, outgoing)
        finally:
            source.close()
            outgoing.drop(source)
        outgoing.say(reason)
        with trio.move_on_after(_FAREWELL_S):
            await outgoing.told()
            await connection.hear_out(_FAREWELL_S, _FAREWELL_BYTES)
        sending.cancel_scope.cancel()


async def _read(connection: Connection, outgoing: Outgoing) -> workload.AuthFailed | workload.Error:
    """Refuse what a peer asks for here; why it is not to be heard any more."""
    while True:
        await outgoing.answered()
        try:
            payload = await connection.receive()
        except FrameTooLarge as error:
            return workload.Error(message=str(error))
        if payload is None:
            # It has nothing to ask, and still reads.
            await trio.sleep_forever()
        try:
            message: HostMessage = decode(payload, HostMessage).body
        except MalformedMessage as error:
            outgoing.say(workload.Error(request_id=request_id_of(payload), message=str(error)))
            continue
        if isinstance(message, workload.Auth):
            return workload.AuthFailed()
        outgoing.say(
            workload.Error(
                request_id=request_id_of(payload),
                message="this port only tells the workload's output; commands go to port 5000",
            )
        )
