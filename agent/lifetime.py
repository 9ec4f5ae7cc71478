"""The agent's life: from its first task to the status that it leaves init with."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import trio

from agent import logs
from agent.config import AgentConfig
from agent.doorbell import ring_doorbell
from agent.errors import AgentError
from agent.isolation import CGROUP_MOUNT, isolated
from agent.server import serve
from agent.services import Services, open_services

log = logging.getLogger(__name__)

POWER_OFF = 0
START_AGAIN = 1


def run(listener: socket.socket, config: AgentConfig) -> int:
    """Serve on ``listener`` until a shutdown request or SIGTERM; the exit status for init."""
    logs.configure(config.log_level)
    for word in config.unknown_words:
        log.warning("innkeep.%s means nothing: misspelt?", word)
    try:
        with nullcontext(CGROUP_MOUNT) if config.in_image else isolated() as cgroup_root:
            return trio.run(_live, listener, config, cgroup_root)
    except AgentError as error:
        print(f"innkeep: {error.message}", file=sys.stderr)
        return START_AGAIN


async def _live(listener: socket.socket, config: AgentConfig, cgroup_root: Path | None) -> int:
    async with open_services(config, cgroup_root) as services, trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signal, services)
        nursery.start_soon(serve, listener, services)
        if listener.family == socket.AF_VSOCK and config.in_image:
            nursery.start_soon(ring_doorbell, services)
        log.info("serving on %s", config.listen)
        await services.stopped.wait()
        nursery.cancel_scope.cancel()
    log.info("stopped")
    return POWER_OFF


async def _stop_on_signal(
    services: Services, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("stopping on %s", signal.Signals(number).name)
            await services.stop()
            services.stopped.set()
            return
