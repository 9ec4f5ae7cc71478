"""The agent's life: from its first task to the status that it leaves init with."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent import logs
from agent.config import AgentConfig
from agent.errors import AgentError
from agent.gate import Gate
from agent.hangup import HangupWatch
from agent.introspection import Introspection
from agent.server import serve
from agent.session import converse, pong
from agent.uptime import started_s, uptime_s
from protocol.errors import ErrorCode

if TYPE_CHECKING:
    from agent.services import Services

log = logging.getLogger(__name__)

CGROUP_MOUNT = Path("/sys/fs/cgroup")
POWER_OFF = 0
START_AGAIN = 1
# Of the scheduler: accept, begin the session, read, answer, and as many to spare. A host that
# asked during the first imports gets its pong before the others take the interpreter.
STEPS_TO_A_PONG = 8

OpenServices = Callable[
    [AgentConfig, Path | None, Introspection], "AbstractAsyncContextManager[Services]"
]
ServeWorkload = Callable[[Sequence[socket.socket], HangupWatch, "Services"], Awaitable[None]]


def run(
    listener: socket.socket,
    workload_listeners: Sequence[socket.socket],
    config: AgentConfig,
    steps: Mapping[str, float],
) -> int:
    """Serve on ``listener`` until a shutdown request or SIGTERM; the exit status for init.

    ``workload_listeners`` are those of the workload's control and of its log, or none; ``steps``
    is what has been done, and when, in seconds after boot.
    """
    introspection = Introspection(steps={"agent": started_s(), **steps})
    logs.configure(config.log_level, introspection.failures)
    for problem in config.problems:
        log.error("configuration: %s", problem)
    with _cgroup_root(config) as cgroup_root:
        return trio.run(_live, listener, workload_listeners, config, cgroup_root, introspection)


@contextmanager
def _cgroup_root(config: AgentConfig) -> Iterator[Path | None]:
    """The directory of cgroup2 below which commands run; outside the image one of our own."""
    if config.in_image:
        yield CGROUP_MOUNT
        return
    from agent.isolation import isolated

    with isolated(CGROUP_MOUNT) as cgroup:
        yield cgroup


async def _live(
    listener: socket.socket,
    workload_listeners: Sequence[socket.socket],
    config: AgentConfig,
    cgroup_root: Path | None,
    introspection: Introspection,
) -> int:
    """Serve first, and import what most requests need while pings are answered already."""
    gate: Gate[Services] = Gate()
    hangups, steps = introspection.hangups, introspection.steps
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signal, gate)
        nursery.start_soon(hangups.run)
        talk = partial(converse, hangups=hangups, services=gate, pong=pong(config.problems))
        nursery.start_soon(serve, listener, config.vsock_peers, talk)
        log.info("serving on %s", config.listen)
        steps["serving"] = uptime_s()
        for _ in range(STEPS_TO_A_PONG):
            await trio.lowlevel.checkpoint()
        open_services = await trio.to_thread.run_sync(_import_services)
        try:
            async with open_services(config, cgroup_root, introspection) as services:
                # Storage and network come up meanwhile, which is mostly other processes' work.
                await trio.to_thread.run_sync(_import_handlers)
                gate.open(services)
                steps["services"] = uptime_s()
                if config.refusal is not None:
                    # Nothing is run by halves of a configuration, for nobody.
                    for each in workload_listeners:
                        each.close()
                elif workload_listeners:
                    serve_workload = await trio.to_thread.run_sync(_import_workload_ports)
                    nursery.start_soon(serve_workload, workload_listeners, hangups, services)
                if config.in_image or config.host_sockets:
                    from agent.doorbell import ring_doorbell

                    nursery.start_soon(ring_doorbell, services, steps)
                if services.kernel is not None:
                    from agent.upkeep import look_after

                    nursery.start_soon(look_after, services)
                await services.stopped.wait()
                if config.in_image and os.getppid() == 1:
                    # For init to end without us: a thread that waits for a share which does not
                    # answer keeps us, and cannot be killed.
                    os.kill(1, signal.SIGHUP)
                nursery.cancel_scope.cancel()
        except AgentError as error:
            log.error("cannot go on: %s", error.message)
            nursery.cancel_scope.cancel()
            return START_AGAIN
    log.info("stopped")
    return POWER_OFF


def _import_services() -> OpenServices:
    from agent.services import open_services

    return open_services


def _import_handlers() -> None:
    # For the first request to find them.
    import agent.handlers
    from protocol.base64_path import choose_base64_path

    assert agent.handlers.HANDLERS
    log.debug("base64: %s", choose_base64_path())


def _import_workload_ports() -> ServeWorkload:
    from agent.workload_sessions.ports import serve_workload

    return serve_workload


async def _stop_on_signal(
    gate: Gate[Services], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("stopping on %s", signal.Signals(number).name)
            services = await gate.passed(ErrorCode.INTERNAL_ERROR)
            await services.power_off()
            return
