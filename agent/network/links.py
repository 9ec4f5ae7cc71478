"""The VM's network interface, set up over netlink. The only user of pyroute2."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from agent.errors import AgentError
from protocol.errors import ErrorCode

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def bring_up(
    interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface,
    gateway: Address | None,
    nameservers: Sequence[Address],
    resolv_conf: Path = Path("/etc/resolv.conf"),
) -> None:
    """Give the VM's first network interface its address, a default route, and name servers.

    Done already, it changes nothing, so that a restarted agent may call it again. Blocks: the
    import alone takes longer than the calls.

    Raises:
        AgentError: there is no interface, or the kernel refused; names the interface.
    """
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as netlink:
        links = [link for link in netlink.get_links() if not _is_loopback(link)]
        if not links:
            raise AgentError(
                ErrorCode.INTERNAL_ERROR, f"configure {interface}: the VM has no network interface"
            )
        link = min(links, key=lambda each: each["index"])
        try:
            netlink.link("set", index=link["index"], state="up")
            netlink.addr(
                "replace",
                index=link["index"],
                address=str(interface.ip),
                prefixlen=interface.network.prefixlen,
            )
            if gateway is not None:
                netlink.route("replace", dst="default", gateway=str(gateway), oif=link["index"])
        except NetlinkError as error:
            name = link.get_attr("IFLA_IFNAME")
            raise AgentError(
                ErrorCode.INTERNAL_ERROR, f"configure {name} with {interface}: {error}"
            ) from error
    if nameservers:
        lines = "".join(f"nameserver {server}\n" for server in nameservers)
        resolv_conf.write_text(lines)


IFF_LOOPBACK = 0x8


def _is_loopback(link: object) -> bool:
    return bool(link["flags"] & IFF_LOOPBACK)  # type: ignore[index]  # pyroute2 is untyped
