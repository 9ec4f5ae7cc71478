"""Network interfaces, set up over netlink: a process of its own, and the only user of pyroute2.

Importing pyroute2 takes longer than the agent's whole start, would hold up the first answers that
long, and leaves 15 MB behind for a few calls. The process reads an order a line and answers each
with a line; agent/network/link_process.py is the agent's end of that. Nothing of the project is
imported here: its messages alone would take the process a third of its time.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

# Duplicate address detection takes from 1 to 2 s (RFC 4862, 5.4.2: a random delay, and one probe).
DAD_LIMIT_S = 5.0

# linux/if_arp.h, linux/if_addr.h, linux/rtnetlink.h
_ARPHRD_ETHER = 1
_IFA_F_DADFAILED, _IFA_F_TENTATIVE = 0x08, 0x40
_RTNH_F_ONLINK, _RT_SCOPE_LINK = 4, 253
_RTMGRP_IPV6_IFADDR = 0x100
_IPV6_SETTINGS = Path("/proc/sys/net/ipv6/conf")


class Order(NamedTuple):
    """What an interface is to have. What it has already, nothing changes.

    ``mac`` names the interface; where none has it, the first gets it. Addresses have their prefix
    lengths. ``lifetime_s``: the kernel takes the addresses away after so many seconds, if any.
    ``routes`` are networks with their gateways, ``NETWORK,GATEWAY``, of which 0.0.0.0 is the
    interface itself. ``lost`` are addresses, and ``gone`` routes, that it is to have no longer.
    """

    mac: str = ""
    mtu: str = ""
    lifetime_s: str = ""
    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()

    def line(self) -> str:
        """``name=value`` words."""
        words = [
            f"{name}={value}"
            for name, values in self._asdict().items()
            for value in (values if isinstance(values, tuple) else (values,))
            if value
        ]
        return " ".join(words)

    @classmethod
    def of_line(cls, line: str) -> Order:
        words = [word.partition("=")[::2] for word in line.split()]
        many = {
            name: tuple(value for key, value in words if key == name)
            for name, default in cls._field_defaults.items()
            if isinstance(default, tuple)
        }
        one = {name: value for name, value in words if name not in many}
        return cls(**one, **many)  # type: ignore[arg-type]  # each is what its default is


def main() -> None:
    """The process of its own: orders come on stdin, and answers go out on stdout."""
    _skip_init("pyroute2")
    from pyroute2.iproute.linux import IPRoute

    with IPRoute() as netlink:
        for line in sys.stdin:
            kind, _, what = line.strip().partition(" ")
            answer = _set(netlink, Order.of_line(what)) if kind == "set" else _settle(netlink, what)
            print("\t".join(" ".join(each.split()) for each in answer), flush=True)


def _set(netlink: Any, order: Order) -> list[str]:
    """The interface's name and what could not be done; without a name there is no interface."""
    links = [link for link in netlink.get_links() if link["ifi_type"] == _ARPHRD_ETHER]
    if not links:
        return ["", "the VM has no network interface"]
    links.sort(key=lambda each: int(each["index"]))
    named = [link for link in links if link.get_attr("IFLA_ADDRESS") == order.mac]
    link = (named or links)[0]
    name, index = str(link.get_attr("IFLA_IFNAME")), link["index"]
    problems: list[str] = []

    def attempt(what: str, call: Callable[..., object], *words: str, **more: object) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            call(*words, **more)
        except (NetlinkError, OSError, ValueError) as error:
            problems.append(f"{what}: {error}")

    if order.mac and not named:
        attempt(f"{name}: mac {order.mac}", netlink.link, "set", index=index, address=order.mac)
    if order.mtu:
        attempt(f"{name}: mtu {order.mtu}", netlink.link, "set", index=index, mtu=int(order.mtu))
    if any(":" in gateway for gateway in order.gateways):
        # Else a router's advertisements would add a default route of their own.
        path = _IPV6_SETTINGS / name / "accept_ra"
        attempt(f"{name}: IPv6", path.write_text, "0")
    attempt("lo: up", netlink.link, "set", index=socket.if_nametoindex("lo"), state="up")
    attempt(f"{name}: up", netlink.link, "set", index=index, state="up")
    # First: the kernel takes further addresses of a network away together with its first one.
    for address in order.lost:
        # Gone already, it is as well.
        with _missing_is_fine():
            netlink.addr(
                "delete",
                index=index,
                **_parts(address),
            )
    for address in order.addresses:
        attempt(
            f"{name}: address {address}",
            netlink.addr,
            "replace",
            index=index,
            **_parts(address),
            **_lifetime(order.lifetime_s),
        )
    for gateway in order.gateways:
        attempt(
            f"{name}: gateway {gateway}",
            netlink.route,
            "replace",
            dst="default",
            family=socket.AF_INET6 if ":" in gateway else socket.AF_INET,
            gateway=gateway,
            oif=index,
            # It need not be in a network of ours, and is on this link all the same.
            flags=_RTNH_F_ONLINK,
        )
    for route in order.routes:
        network, there = _ways(route)
        attempt(
            f"{name}: route to {network}",
            netlink.route,
            "replace",
            dst=network,
            oif=index,
            **there,
        )
    # Last: a route that another one has replaced is gone already.
    for route in order.gone:
        network, there = _ways(route)
        with _missing_is_fine():
            netlink.route("delete", dst=network, oif=index, **there)
    return [name, *problems]


def _ways(route: str) -> tuple[str, Mapping[str, object]]:
    """A route's network, and where it leads."""
    network, via = route.split(",")
    if via == "0.0.0.0":
        return network, {"scope": _RT_SCOPE_LINK}
    return network, {"gateway": via, "flags": _RTNH_F_ONLINK}


def _parts(address: str) -> Mapping[str, Any]:
    ip, _, prefix = address.partition("/")
    return {"address": ip, "prefixlen": int(prefix)}


def _lifetime(lifetime_s: str) -> Mapping[str, int]:
    return dict.fromkeys(("valid_lft", "preferred_lft"), int(lifetime_s)) if lifetime_s else {}


@contextmanager
def _missing_is_fine() -> Iterator[None]:
    from pyroute2.netlink.exceptions import NetlinkError

    with suppress(NetlinkError):
        yield


def _settle(netlink: Any, name: str) -> list[str]:
    """The interface's name, and what duplicate address detection has against its addresses."""
    index = socket.if_nametoindex(name)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        # Each change of an address is told there, and only that something is: it is asked anew.
        events.bind((0, _RTMGRP_IPV6_IFADDR))
        deadline = time.monotonic() + DAD_LIMIT_S
        while True:
            flags = {
                address.get_attr("IFA_ADDRESS"): address.get_attr("IFA_FLAGS")
                for address in netlink.get_addr(family=socket.AF_INET6, index=index)
            }
            tentative = [address for address, bits in flags.items() if _is_tentative(bits)]
            left_s = deadline - time.monotonic()
            if not tentative or left_s <= 0:
                break
            if select.select([events], [], [], left_s)[0]:
                events.recv(1 << 16)
    return [
        name,
        *(
            f"{name}: address {address}: another machine on the link has it"
            for address, bits in flags.items()
            if bits & _IFA_F_DADFAILED
        ),
        *(
            f"{name}: address {address}: not in use after {DAD_LIMIT_S:.0f} s: is the link up?"
            for address in tentative
        ),
    ]


def _is_tentative(flags: int) -> bool:
    return bool(flags & _IFA_F_TENTATIVE) and not flags & _IFA_F_DADFAILED


def _skip_init(name: str) -> None:
    """Have a package's modules imported without the package itself, which imports all of them."""
    found = PathFinder.find_spec(name)
    assert found is not None
    package = ModuleType(name)
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules[name] = package
