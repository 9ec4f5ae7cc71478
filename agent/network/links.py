"""The VM's network interface, set up over netlink. The only user of pyroute2."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# The process of its own imports this module too, and nothing of the project beside it: the
# messages alone take it a third of its time. So what only the agent needs is imported where it is.

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

RESOLV_CONF = Path("/etc/resolv.conf")
IFF_LOOPBACK = 0x8
# Under emulation the import alone takes seconds.
LIMIT_S = 60


def bring_up(interface: Interface, gateway: Address | None) -> None:
    """Give the VM's first network interface its address and a default route.

    Done already, it changes nothing, so that a restarted agent may call it again. Blocks.

    pyroute2 is used in a process of its own: importing it takes longer than the agent's whole
    start, would hold up the first answers that long, and leaves 15 MB behind for three calls.

    Raises:
        AgentError: INTERNAL_ERROR: there is no interface, or the kernel refused; says which.
    """
    from agent.errors import failing_as
    from protocol.errors import ErrorCode

    doing = f"configure the network with {interface}"
    program = (
        "import sys; sys.path[:] = sys.argv.pop(1).split(':'); "
        "from agent.network.links import main; main()"
    )
    found_in = ":".join(filter(None, sys.path))
    words = [found_in, str(interface), str(gateway or "")]
    with failing_as(ErrorCode.INTERNAL_ERROR, doing):
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=LIMIT_S,
        )


def use_nameservers(nameservers: Sequence[Address], resolv_conf: Path = RESOLV_CONF) -> None:
    """Have names resolved by these, resolv.conf(5). Blocks.

    Raises:
        AgentError: INTERNAL_ERROR: the file cannot be written.
    """
    from agent.errors import failing_as
    from protocol.errors import ErrorCode

    with failing_as(ErrorCode.INTERNAL_ERROR, "name the name servers"):
        resolv_conf.write_text("".join(f"nameserver {server}\n" for server in nameservers))


def main() -> None:
    """The process of its own: arguments are the interface and the gateway, which may be empty."""
    interface, gateway = sys.argv[1:]
    sys.exit(_configure(ipaddress.ip_interface(interface), gateway))


def _configure(interface: Interface, gateway: str) -> str | None:
    """Set up the first interface that is not the loopback; what was refused, or None."""
    _skip_init("pyroute2")
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as netlink:
        links = [link for link in netlink.get_links() if not link["flags"] & IFF_LOOPBACK]
        if not links:
            return "the VM has no network interface"
        link: Any = min(links, key=lambda each: each["index"])
        try:
            netlink.link("set", index=link["index"], state="up")
            netlink.addr(
                "replace",
                index=link["index"],
                address=str(interface.ip),
                prefixlen=interface.network.prefixlen,
            )
            if gateway:
                netlink.route("replace", dst="default", gateway=gateway, oif=link["index"])
        except NetlinkError as error:
            return f"{link.get_attr('IFLA_IFNAME')}: {error}"
    return None


def _skip_init(name: str) -> None:
    """Have a package's modules imported without the package itself, which imports all of them."""
    found = PathFinder.find_spec(name)
    assert found is not None
    package = ModuleType(name)
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules[name] = package
