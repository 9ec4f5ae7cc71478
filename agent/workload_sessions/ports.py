"""The workload's two ports, as long as the agent serves."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from functools import partial

import trio

from agent.errors import AgentError
from agent.gate import Gate
from agent.hangup import HangupWatch
from agent.server import serve
from agent.services import Services
from agent.workload_sessions.control import serve_control
from agent.workload_sessions.logs import serve_logs
from agent.workload_sessions.opening import Workload, open_workload

log = logging.getLogger(__name__)


async def serve_workload(
    listeners: Sequence[socket.socket], hangups: HangupWatch, services: Services
) -> None:
    """Serve control and log until cancelled; the caller closes the two listeners."""
    control, logs = listeners
    peers = services.config.vsock_peers
    gate: Gate[Workload] = Gate()
    async with trio.open_nursery() as nursery:
        for listener, talk in ((control, serve_control), (logs, serve_logs)):
            nursery.start_soon(serve, listener, peers, partial(talk, hangups=hangups, gate=gate))
        try:
            async with open_workload(services) as workload:
                gate.open(workload)
                await trio.sleep_forever()
        except AgentError as error:
            log.error("no workload is served: %s", error.message)
            gate.fail(error)
