"""Telling the host that the VM is ready."""

from __future__ import annotations

import logging
import socket
import time

import trio

from agent.errors import AgentError
from agent.services import Services
from protocol.constants import Cid
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# A host port that nobody listens on may take 2 s to refuse; a host is not waited for longer.
PATIENCE_S = 5.0
READY_PORT = 6004


async def ring_doorbell(services: Services) -> None:
    """Connect once to the host's doorbell port when storage and network are up.

    Nobody listening there is fine; so is a part that could not be brought up: the host learns of
    it from the request that needs it.
    """
    for gate in (services.images, services.network):
        try:
            await gate.passed(ErrorCode.INTERNAL_ERROR)
        except AgentError as error:
            log.error("%s", error.message)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as plain:
        plain.setblocking(False)
        with trio.move_on_after(PATIENCE_S):
            try:
                plain.connect((Cid.HOST, READY_PORT))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(plain)
            except OSError as error:
                log.debug("nobody at the doorbell: %s", error)
    log.info("ready %.3f s after boot", time.clock_gettime(time.CLOCK_BOOTTIME))
