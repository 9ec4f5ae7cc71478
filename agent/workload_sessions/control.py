"""The control port (5000): many commands at once on one connection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import attrs
import trio

from agent.connection import Connection, PeerGone
from agent.errors import AgentError
from agent.gate import Gate
from agent.hangup import HangupWatch
from agent.processes.attach import attach
from agent.processes.process import Stream
from agent.workload.commands import InvalidSignal, Running
from agent.workload.end import End
from agent.workload.place import Words
from agent.workload.supervisor import Busy, Run
from agent.workload_sessions.authentication import authenticated
from agent.workload_sessions.log_source import WORKLOAD_ID, LogSource
from agent.workload_sessions.opening import Workload
from agent.workload_sessions.outbox import Outbox
from agent.workload_sessions.outgoing import Outgoing
from protocol import HostMessage, decode, request_id_of, workload
from protocol.errors import ErrorCode, FrameTooLarge, MalformedMessage

log = logging.getLogger(__name__)

_FAREWELL_S = 1.0
_FAREWELL_BYTES = 64 * 1024 * 1024
# On one connection: each takes up to 2 MiB and a few descriptors.
_MOST_COMMANDS = 1024
_FLUSH_S = 1.0


async def serve_control(connection: Connection, hangups: HangupWatch, gate: Gate[Workload]) -> None:
    """Serve one connection until its peer is done or gone; the caller closes it.

    A hang-up ends what the connection has running by ``exec``, and never the workload.
    """
    with trio.CancelScope() as conversation:
        try:
            with hangups.watching(connection.socket, conversation.cancel):
                admitted = await authenticated(connection, gate)
                if admitted is not None:
                    await _converse(connection, admitted[0])
        except* PeerGone as gone:
            log.debug("the peer is gone: %s", gone.exceptions[0])


async def _converse(connection: Connection, shared: Workload) -> None:
    outgoing = Outgoing(connection)
    async with trio.open_nursery() as sending:
        sending.start_soon(outgoing.run)
        outgoing.say(workload.AuthOk())
        session = _Session(connection, shared, outgoing)
        with session.held:
            is_cut_off = await session.run()
        if is_cut_off:
            with trio.move_on_after(_FLUSH_S):
                await outgoing.told()
                await connection.hear_out(_FAREWELL_S, _FAREWELL_BYTES)
        else:
            await outgoing.flushed()
        sending.cancel_scope.cancel()


@attrs.define(eq=False)
class _Session:
    """One authenticated connection: what it has asked for, by the ids that it gave."""

    _connection: Connection
    _shared: Workload
    _outgoing: Outgoing
    held: ExitStack = attrs.field(factory=ExitStack)
    """To be closed in the end."""
    _requests: dict[int, Running] = attrs.field(factory=dict)
    """Those whose exit the peer has not been told yet."""

    async def run(self) -> bool:
        """Until the peer has nothing more to ask, and all that it asked for is over.

        Returns whether it was cut off: then only answers are left to be told.
        """
        async with trio.open_nursery() as commands:
            commands.start_soon(self._tell_ready)
            reason: workload.AuthFailed | workload.Error | None
            try:
                reason = await self._read(commands)
            except FrameTooLarge as error:
                reason = workload.Error(message=str(error))
            if reason is None:
                return False
            commands.cancel_scope.cancel()
        self._outgoing.say(reason)
        return True

    async def _read(self, commands: trio.Nursery) -> workload.AuthFailed | None:
        """Answer messages until the peer has no more, or is not to be heard any more."""
        while True:
            await self._outgoing.answered()
            payload = await self._connection.receive()
            if payload is None:
                return None
            try:
                message: HostMessage = decode(payload, HostMessage).body
            except MalformedMessage as error:
                self._refuse(request_id_of(payload), str(error))
                continue
            if isinstance(message, workload.Auth):
                log.warning("a connection to the workload's port authenticated twice")
                return workload.AuthFailed()
            _ANSWERS[type(message)](self, message, commands)

    async def _tell_ready(self) -> None:
        try:
            await self._shared.place.ready()
            self._outgoing.say(workload.Ready())
        except AgentError as error:
            self._outgoing.say(workload.Error(message=f"commands cannot run: {error.message}"))
        supervisor = self._shared.supervisor
        if supervisor.boots_end is not None:
            self._tell_boots_end(supervisor.boots_end)
        supervisor.on_boots_end.append(self._tell_boots_end)
        self.held.callback(supervisor.on_boots_end.remove, self._tell_boots_end)

    def _tell_boots_end(self, end: End) -> None:
        self._outgoing.say(workload.Exit(WORKLOAD_ID, end.code, end.reason))

    def _exec(self, message: workload.Exec, commands: trio.Nursery) -> None:
        if not self._may_begin(message.request_id):
            return
        if self._shared.commands.is_stopping or not self._shared.supervisor.may_start():
            self._refuse(message.request_id, "everything is being stopped")
            return
        # Entered here: a signal may be the very next message.
        with ExitStack() as stack:
            running = stack.enter_context(self._shared.commands.entered())
            self._requests[message.request_id] = running
            commands.start_soon(self._see_through, message, running, stack.pop_all())

    async def _see_through(self, message: workload.Exec, running: Running, held: ExitStack) -> None:
        """A further command, from its start to its end."""
        request_id = message.request_id
        outbox = Outbox(request_id, partial(self._forget, request_id))
        room = partial(self._outgoing.made_room, outbox)

        async def put(stream: Stream, data: bytes) -> None:
            outbox.put(stream, data)
            self._outgoing.ready(outbox)

        with held, ExitStack() as unfinished:
            unfinished.callback(outbox.close)
            try:
                await self._shared.place.ready()
                words = Words(message.command)
                async with self._shared.place.running(words, terminal=message.tty) as started:
                    running.started(started.group)
                    self._outgoing.say(workload.Started(request_id))
                    outcome = await attach(started.process, put, _no_input, room=room)
                is_child = not started.group.in_container
                end = End.of(outcome, stopped=running.stopped, is_child=is_child)
            except AgentError as error:
                if self._is_refused(request_id, error):
                    return
                end = End.unstarted(error.message)
            unfinished.pop_all()
        outbox.end(workload.Exit(request_id, end.code, end.reason))
        self._outgoing.ready(outbox)

    def _run(self, message: workload.Run, commands: trio.Nursery) -> None:
        request_id = message.request_id
        if not self._may_begin(request_id):
            return
        words = Words(message.command, message.env, message.workdir)
        try:
            run = self._shared.supervisor.begin(words)
        except Busy as busy:
            self._refuse(request_id, str(busy))
            return
        self._requests[request_id] = run.running
        forget = partial(self._forget, request_id)
        source = LogSource.of_run(self._shared.log, self._outgoing, request_id, run, forget)
        self.held.callback(source.close)
        commands.start_soon(self._follow, request_id, run, source)

    async def _follow(self, request_id: int, run: Run, source: LogSource) -> None:
        """Tell of the workload that this connection has started."""
        await run.decided.wait()
        if run.refusal is not None and self._is_refused(request_id, run.refusal):
            source.close()
            return
        if run.refusal is None:
            self._outgoing.say(workload.Started(request_id))
        source.open()
        await run.over.wait()
        self._outgoing.ready(source)

    def _signal(self, message: workload.Signal, commands: trio.Nursery) -> None:
        request_id = message.request_id
        running = self._requests.get(request_id)
        workloads = self._shared.supervisor.current
        if running is None and request_id == WORKLOAD_ID and workloads is not None:
            running = workloads.running
        if running is None:
            nothing = "no workload runs, and " if request_id == WORKLOAD_ID else ""
            text = f"signal: {nothing}no command has the request_id {request_id}"
            self._refuse(request_id, text)
            return
        try:
            running.signal(message.signal)
        except InvalidSignal as error:
            self._refuse(request_id, f"signal: {error}")

    def _stop(self, message: workload.Stop, commands: trio.Nursery) -> None:
        self._shared.supervisor.stop(message.timeout_ms / 1000)

    def _may_begin(self, request_id: int) -> bool:
        """Whether a request may have that id; if not, the peer is told."""
        problem = None
        if request_id in self._requests:
            problem = f"the request_id {request_id} is in use"
        elif request_id == WORKLOAD_ID and self._shared.supervisor.words is not None:
            problem = f"the request_id {WORKLOAD_ID} is that of the workload started at boot"
        elif len(self._requests) >= _MOST_COMMANDS:
            problem = f"this connection has {_MOST_COMMANDS} commands already"
        if problem is not None:
            self._refuse(request_id, problem)
        return problem is None

    def _is_refused(self, request_id: int, error: AgentError) -> bool:
        """Whether a request was no command at all; then the peer is told."""
        if error.code is not ErrorCode.INVALID_REQUEST:
            return False
        self._forget(request_id)
        self._refuse(request_id, error.message)
        return True

    def _forget(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

    def _refuse(self, request_id: int | None, message: str) -> None:
        self._outgoing.say(workload.Error(request_id=request_id, message=message))


async def _no_input() -> bytes | None:
    """stdin is /dev/null, and nobody types on a terminal."""
    await trio.sleep_forever()


# A method takes its own class of message, which a mapping over all of them cannot say.
_ANSWERS: Mapping[type, Callable[[_Session, Any, trio.Nursery], None]] = {
    workload.Run: _Session._run,
    workload.Exec: _Session._exec,
    workload.Signal: _Session._signal,
    workload.Stop: _Session._stop,
}
