"""The VM's network interface: set up once, and kept as its DHCP server wants it."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError, cause_of
from agent.network import resolv_conf
from agent.network.dhcp import Client
from agent.network.lease import Lease
from agent.network.link_process import Links, open_links
from agent.network.links import Order
from agent.network.uplink_config import UplinkConfig
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# How long requests that need the network wait for a server's answer; udhcpc has asked five times
# by then, and goes on asking.
LEASE_LIMIT_S = 5.0


@attrs.define(eq=False, kw_only=True)
class Uplink:
    """One interface, for the agent's lifetime.

    ``decided`` is called with None when the network is up, and with the cause when it is not: once
    before anybody has waited long, and whenever that changes. ``renamed`` is called in a thread
    with resolv.conf's former text and its new one.
    """

    config: UplinkConfig
    client: Client
    """For DHCP, where the configuration wants it."""
    decided: Callable[[AgentError | None], None]
    renamed: Callable[[str, str], None]
    filtered: bool = False
    """Whether the DNS filter resolves all names: nobody else's name servers are used."""
    resolv_conf: Path = resolv_conf.RESOLV_CONF
    _lease: Lease | None = None
    _of_links: tuple[str, ...] = ()
    _of_dhcp: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What cannot be had of the configuration, as it is now, a sentence each."""
        return (*self._of_links, *self._of_dhcp)

    async def run(self) -> None:
        """Set the interface up and keep its lease; returns where there is none to keep."""
        if not self.config.dhcp:
            with self._reporting():
                async with open_links() as links:
                    await self._settle(links, await self._set_up(links))
            self._decide()
            return
        async with trio.open_nursery() as nursery:
            with self._reporting(), self.client.bell() as bell:
                async with open_links() as links:
                    interface = await self._set_up(links)
                    nursery.start_soon(self.client.keep_running, interface)
                    with trio.move_on_after(LEASE_LIMIT_S):
                        await self._first_lease(bell)
                    await self._take(links, interface, self._found())
                    await self._settle(links, interface)
                await self._keep(bell, interface)
            self._decide()

    async def _keep(self, bell: int, interface: str) -> None:
        """Go by each further lease; never returns."""
        while True:
            self._decide()
            await self._rung(bell)
            if (lease := self._found()) != self._lease:
                with self._reporting():
                    async with open_links() as links:
                        await self._take(links, interface, lease)

    async def _set_up(self, links: Links) -> str:
        """Everything that needs no server; the interface's name."""
        config = self.config
        await self._use_nameservers()
        order = Order(
            mac=config.mac or "",
            mtu=str(config.mtu or ""),
            addresses=tuple(map(str, config.addresses)),
            gateways=tuple(map(str, config.gateways)),
        )
        done = await links.carry_out(order)
        self._note_links(done.problems)
        if any(address.version == 4 for address in config.addresses):
            # An IPv6 address is not usable before its uniqueness is known, a second later.
            self._decide()
        return done.interface

    async def _settle(self, links: Links, interface: str) -> None:
        if any(address.version == 6 for address in self.config.addresses):
            self._note_links((*self._of_links, *await links.settle(interface)))
        if self.config.addresses and not self._of_links:
            addresses = ", ".join(map(str, self.config.addresses))
            log.info("network: %s has %s", interface, addresses)

    async def _take(self, links: Links, interface: str, lease: Lease | None) -> None:
        """Go by a lease, or by its being over."""
        before, self._lease = self._lease or self.client.lost(), lease
        lost = before is not None and (lease is None or lease.address != before.address)
        ways = self._ways(lease)
        order = Order(
            mac=self.config.mac or "",
            lost=(str(before.address),) if before and lost else (),
            gone=tuple(way for way in self._ways(before) if way not in ways),
        )
        if lease is not None:
            left_s = lease.left_s(_now_s())
            gateways = tuple(str(each) for each in self.config.gateways if each.version == 4)
            order = order._replace(
                mtu=str(self.config.mtu or lease.mtu or ""),
                addresses=(str(lease.address),),
                lifetime_s="" if left_s is None else str(left_s),
                gateways=gateways or ((str(lease.gateway),) if lease.gateway else ()),
                routes=tuple(f"{network},{via}" for network, via in lease.routes),
            )
        self._of_dhcp = (await links.carry_out(order)).problems
        if lease is None:
            over = f"the DHCP lease of {before.address} is over" if before else None
            silent = f"{interface}: no DHCP server has answered in {LEASE_LIMIT_S:.0f} s"
            self._of_dhcp = (*self._of_dhcp, over or silent)
        else:
            level = logging.INFO if before is None or lost else logging.DEBUG
            server = lease.server or "that does not say who it is"
            log.log(
                level, "network: %s has %s from DHCP server %s", interface, lease.address, server
            )
        for problem in self._of_dhcp:
            log.error("network: %s", problem)
        await self._use_nameservers()
        if lease is not None:
            self._decide()

    def _ways(self, lease: Lease | None) -> tuple[str, ...]:
        """All routes that a lease brings, the default one too where no word says another."""
        if lease is None:
            return ()
        ways = [f"{network},{via}" for network, via in lease.routes]
        if lease.gateway and not any(each.version == 4 for each in self.config.gateways):
            ways.append(f"0.0.0.0/0,{lease.gateway}")
        return tuple(ways)

    async def _use_nameservers(self) -> None:
        """Those of the configuration, else those of the lease, else what there is already."""
        lease = self._lease
        nameservers = self.config.nameservers or (lease.nameservers if lease else ())
        if not nameservers or self.filtered:
            return
        text = resolv_conf.resolv_conf(nameservers, lease.search if lease else ())
        before = await trio.to_thread.run_sync(resolv_conf.use, text, self.resolv_conf)
        if before is not None:
            await trio.to_thread.run_sync(self.renamed, before, text)

    async def _first_lease(self, bell: int) -> None:
        while self._found() is None:
            await self._rung(bell)

    async def _rung(self, bell: int) -> None:
        """Return when there may be another lease, or the one that there is must be over."""
        left_s = self._lease.left_s(_now_s()) if self._lease is not None else None
        with trio.move_on_after(math.inf if left_s is None else left_s + 1):
            await trio.lowlevel.wait_readable(bell)
            os.read(bell, 4096)

    def _found(self) -> Lease | None:
        """The lease that the client has, where it is one and not over."""
        try:
            lease = self.client.lease()
        except ValueError as error:
            log.error("network: the DHCP server's answer is no lease: %s", cause_of(error))
            return None
        return None if lease is None or lease.left_s(_now_s()) == 0 else lease

    def _note_links(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            if problem not in self._of_links:
                log.error("network: %s", problem)
        self._of_links = problems

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """What ends the block is one more problem, and the network none the worse for others."""
        try:
            yield
        except (AgentError, OSError) as error:
            what = error.message if isinstance(error, AgentError) else cause_of(error)
            self._note_links((*self._of_links, what))

    def _decide(self) -> None:
        """Open to what needs the network, if there is anything of it."""
        failed = sum(": address " in problem for problem in self._of_links)
        if self._lease is None and len(self.config.addresses) <= failed and self.problems:
            problems = "; ".join(self.problems)
            message = f"configure the network: {problems}"
            self.decided(AgentError(ErrorCode.INTERNAL_ERROR, message))
        else:
            self.decided(None)


def _now_s() -> float:
    """As /proc/uptime has it, which is what a lease's time is told in."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
