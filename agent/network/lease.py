"""What a DHCP server lets the VM have, as dhcp_event.sh writes it down."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import attrs

# RFC 2131, 3.3: without an end.
_INFINITE_S = 0xFFFFFFFF
# What ipaddress and int say to what is none of theirs.
_NOT_ONE = ValueError


@attrs.frozen(kw_only=True)
class Lease:
    """An address, until ``ends_s`` after boot (None: for ever), and what comes with it."""

    address: ipaddress.IPv4Interface
    ends_s: float | None
    gateway: ipaddress.IPv4Address | None
    routes: tuple[tuple[ipaddress.IPv4Network, ipaddress.IPv4Address], ...]
    """Without the default one."""
    nameservers: tuple[ipaddress.IPv4Address, ...]
    search: tuple[str, ...]
    mtu: int | None
    server: str

    def left_s(self, now_s: float) -> int | None:
        """Whole seconds that it is still valid; None: for ever."""
        return None if self.ends_s is None else max(0, int(self.ends_s - now_s))


def read_lease(path: Path) -> Lease | None:
    """The lease that a file holds; None where there is none.

    Raises:
        ValueError: what the server said is no lease.
        OSError: the file cannot be read.
    """
    with suppress(FileNotFoundError):
        return lease_of(path.read_text(encoding="utf-8", errors="replace"))
    return None


def lease_of(text: str) -> Lease:
    """The lease that udhcpc's variables describe, ``name=value`` a line. Raises ValueError.

    What comes with the address is left out where it means nothing: an address is worth having.
    """
    found = dict(line.partition("=")[::2] for line in text.splitlines())
    if missing := {"at_s", "ip", "mask", "lease"} - found.keys():
        raise ValueError(f"without {', '.join(sorted(missing))}")
    seconds = int(found["lease"] or _INFINITE_S)
    routes = _routes(found)
    default = [gateway for network, gateway in routes if network.prefixlen == 0]
    # Where there are classless routes, the router's option counts for nothing (RFC 3442).
    routers = default if routes else _addresses(found, "router")
    mtu = found.get("mtu", "")
    return Lease(
        address=ipaddress.IPv4Interface(f"{found['ip']}/{found['mask'] or 32}"),
        ends_s=None if seconds >= _INFINITE_S else float(found["at_s"]) + seconds,
        gateway=routers[0] if routers else None,
        routes=tuple(route for route in routes if route[0].prefixlen),
        nameservers=_addresses(found, "dns"),
        search=tuple((found.get("search") or found.get("domain", "")).split()),
        # RFC 2132, 5.1: 68 is the least.
        mtu=int(mtu) if mtu.isdecimal() and int(mtu) >= 68 else None,
        server=found.get("serverid", ""),
    )


def _routes(
    found: Mapping[str, str],
) -> tuple[tuple[ipaddress.IPv4Network, ipaddress.IPv4Address], ...]:
    """Option 121, as udhcpc has it: networks and gateways in turn."""
    words = found.get("staticroutes", "").split()
    with suppress(_NOT_ONE):
        return tuple(
            (ipaddress.IPv4Network(network, strict=False), ipaddress.IPv4Address(gateway))
            for network, gateway in zip(words[::2], words[1::2], strict=True)
        )
    return ()


def _addresses(found: Mapping[str, str], name: str) -> tuple[ipaddress.IPv4Address, ...]:
    addresses = []
    for word in found.get(name, "").split():
        with suppress(_NOT_ONE):
            addresses.append(ipaddress.IPv4Address(word))
    return tuple(addresses)
