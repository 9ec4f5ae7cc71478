"""The network as the kernel has it now, whoever set it up."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from pathlib import Path

from agent.kernel_files import content
from agent.linux.getifaddrs import getifaddrs
from protocol.machine import Interface, Route

_MOST_INTERFACES = 64
_MOST_ADDRESSES = 64
_MOST_ROUTES = 256
_RESOLV_CONF = Path("/etc/resolv.conf")
_RESOLV_CONF_BYTES = 4096

# linux/if.h, linux/route.h
_IFF_UP = 0x1
_RTF_UP, _RTF_LOCAL = 0x1, 0x80000000


def interfaces() -> tuple[Interface, ...]:
    """Those of this network namespace, with their addresses. Raises OSError."""
    addresses: defaultdict[str, list[str]] = defaultdict(list)
    for name, address in getifaddrs():
        addresses[name].append(str(address))
    names = sorted(os.listdir("/sys/class/net"))  # noqa: PTH208 names alone
    return tuple(
        Interface(
            name=name,
            up=bool(int(_of(name, "flags") or "0", 16) & _IFF_UP),
            # Of one that is down it cannot be read.
            carrier=_of(name, "carrier") == "1",
            mac=_of(name, "address"),
            mtu=int(_of(name, "mtu") or 0),
            addresses=tuple(addresses[name][:_MOST_ADDRESSES]),
        )
        for name in names[:_MOST_INTERFACES]
        # A file of the bonding driver is there, too.
        if os.path.isdir(f"/sys/class/net/{name}")  # noqa: PTH112 for a name
    )


def routes() -> tuple[Route, ...]:
    """Those of the main tables, IPv4 before IPv6. Raises OSError."""
    found = [*_routes4(), *_routes6()]
    return tuple(found[:_MOST_ROUTES])


def resolv_conf(path: Path = _RESOLV_CONF) -> str | None:
    """Where names are resolved, resolv.conf(5); None if there is no such file."""
    try:
        with path.open("rb") as file:
            return file.read(_RESOLV_CONF_BYTES).decode(errors="replace")
    except OSError:
        return None


def _of(interface: str, file: str) -> str:
    return content(f"/sys/class/net/{interface}/{file}").decode().strip()


def _routes4() -> Iterator[Route]:
    """By /proc/net/route: addresses are numbers as the processor has them."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        interface, destination, gateway, flags, _, _, metric, mask, *_ = line.split()
        if not int(flags, 16) & _RTF_UP:
            continue
        length = int(mask, 16).bit_count()
        network = ip_network((_address4(destination), length), strict=False)
        via = _address4(gateway)
        yield Route(
            destination=str(network),
            gateway=None if via == IPv4Address(0) else str(via),
            interface=interface,
            metric=int(metric),
        )


def _address4(number: str) -> IPv4Address:
    return IPv4Address(bytes.fromhex(number)[::-1])


def _routes6() -> Iterator[Route]:
    """By /proc/net/ipv6_route, which has the kernel's own table of local addresses as well."""
    path = Path("/proc/net/ipv6_route")
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        destination, length, _, _, gateway, metric, _, _, flags, interface = line.split()
        if not int(flags, 16) & _RTF_UP or int(flags, 16) & _RTF_LOCAL or interface == "lo":
            continue
        network = IPv6Network((bytes.fromhex(destination), int(length, 16)), strict=False)
        if network.is_multicast:
            continue
        via = IPv6Address(bytes.fromhex(gateway))
        yield Route(
            destination=str(network),
            gateway=None if via == IPv6Address(0) else str(via),
            interface=interface,
            metric=int(metric, 16),
        )
