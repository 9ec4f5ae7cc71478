"""The VM's network as the whole agent has it: its interface, and who waits for that."""

from __future__ import annotations

import logging
import socket
from functools import partial
from pathlib import Path

import attrs

from agent.config import AgentConfig
from agent.errors import AgentError, cause_of
from agent.gate import Gate
from agent.network.dhcp import Client
from agent.network.uplink import Uplink
from agent.processes.network_files import renew_resolv_conf
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# Init's own: what is in there outlives the agent.
CGROUP_OF_INIT = Path("/sys/fs/cgroup/init")


@attrs.define(eq=False)
class VmNetwork:
    """Set up in the background, where the boot configuration says how; else it is as it should be
    already. A VM whose network is broken is best mended through the agent that serves on vsock,
    so nothing of it is fatal."""

    gate: Gate[None]
    """Open once there is a network; requests that need one wait there."""
    _uplink: Uplink | None
    _error: str | None

    @classmethod
    def of(cls, config: AgentConfig) -> VmNetwork:
        """The one of this boot."""
        gate: Gate[None] = Gate()
        if config.uplink is None:
            return cls(gate, None, config.uplink_error)
        client = Client(
            hostname=socket.gethostname(),
            directory=config.run_dir / "dhcp",
            cgroup=CGROUP_OF_INIT if CGROUP_OF_INIT.exists() else None,
        )
        uplink = Uplink(
            config=config.uplink,
            client=client,
            decided=partial(_decide, gate),
            renamed=partial(renew_resolv_conf, config.run_dir),
            filtered=config.dns_filter,
        )
        return cls(gate, uplink, None)

    @property
    def problems(self) -> tuple[str, ...]:
        """What cannot be had of its configuration, a sentence each."""
        if self._uplink is not None:
            return self._uplink.problems
        return () if self._error is None else (self._error,)

    async def run(self) -> None:
        """Set it up, and keep it."""
        if self._uplink is None:
            failure = None
            if self._error is not None:
                message = f"configure the network: {self._error}"
                failure = AgentError(ErrorCode.INTERNAL_ERROR, message)
            _decide(self.gate, failure)
            return
        try:
            await self._uplink.run()
        except Exception as error:
            log.exception("network: internal error")
            message = f"configure the network: {cause_of(error)}"
            self.gate.fail(AgentError(ErrorCode.INTERNAL_ERROR, message))

    async def renew(self) -> None:
        """For a VM that goes on after a pause, elsewhere perhaps: set up again what is fixed, and
        have the DHCP server asked again, by whose answer the VM goes as ever."""
        if self._uplink is None:
            return
        if self._uplink.config.dhcp:
            self._uplink.client.renew()
        else:
            await self.run()

    async def end(self) -> None:
        """Give back what others lent: the VM is about to end."""
        if self._uplink is not None and self._uplink.config.dhcp:
            await self._uplink.client.end()


def _decide(gate: Gate[None], failure: AgentError | None) -> None:
    if failure is None:
        gate.open(None)
    else:
        gate.fail(failure)
