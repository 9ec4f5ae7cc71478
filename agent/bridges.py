"""What the agent serves in the VM on its host's behalf, for as long as it lives itself."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import attrs
import trio

from agent.config import AgentConfig
from agent.errors import AgentError, cause_of
from agent.network import dns_filter, resolv_conf, ssh_agent
from agent.network.host import Host
from agent.processes.command import Bind

log = logging.getLogger(__name__)


@attrs.frozen
class Bridges:
    """What commands and containers get of them."""

    environment: Mapping[str, str] = attrs.field(factory=dict)
    """Variables that every command has, unless it is given another."""
    binds: Sequence[Bind] = ()
    """What every container has, besides its mounts."""


def open_bridges(
    config: AgentConfig, host: Host, held: ExitStack, nursery: trio.Nursery
) -> Bridges:
    """Serve in ``nursery`` what the configuration wants; the sockets are closed with ``held``.

    One that cannot be is logged, and takes nothing else down. Blocks shortly.
    """
    if config.dns_filter:
        if config.in_image:
            # Nobody else is asked, even when it cannot be started.
            try:
                address = ipaddress.ip_address(dns_filter.ADDRESS)
                resolv_conf.use(resolv_conf.resolv_conf([address]))
            except AgentError as error:
                log.error("dns filter: %s", error.message)
        try:
            sockets = held.enter_context(dns_filter.listening())
        except OSError as error:
            where = f"{dns_filter.ADDRESS}:{dns_filter.PORT}"
            log.error("dns filter: listen on %s: %s", where, cause_of(error))
        else:
            filtering = partial(dns_filter.serve, sockets, host)
            nursery.start_soon(_kept_from_harm, "dns filter", filtering)
    if config.ssh_agent:
        try:
            listener = held.enter_context(ssh_agent.listening())
        except OSError as error:
            log.error("ssh agent: listen: %s", cause_of(error))
        else:
            nursery.start_soon(
                _kept_from_harm, "ssh agent", partial(ssh_agent.serve, listener, host)
            )
            socket = str(ssh_agent.SOCKET)
            bind = Bind(socket, socket, gives_way=True)
            return Bridges({ssh_agent.VARIABLE: socket}, (bind,))
    return Bridges()


async def _kept_from_harm(what: str, serve: Callable[[], Awaitable[None]]) -> None:
    """A defect of one of them is logged, and is that one's end alone."""
    try:
        await serve()
    except Exception:
        log.exception("%s: internal error", what)
