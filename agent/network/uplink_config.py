"""How the VM's network interface is to be set up, as the boot configuration has it."""

from __future__ import annotations

import ipaddress

import attrs

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

# RFC 8200, 5: IPv6 is not spoken on links with less.
IPV6_LEAST_MTU = 1280


@attrs.frozen(kw_only=True)
class UplinkConfig:
    """``dhcp``: its IPv4 address, and what is not said here, come from a DHCP server.

    ``mac`` names the interface; where none has it, the first gets it. Without one it is the first.
    """

    dhcp: bool = False
    addresses: tuple[Interface, ...] = ()
    gateways: tuple[Address, ...] = ()
    """One of a family at most."""
    nameservers: tuple[Address, ...] = ()
    mac: str | None = None
    mtu: int | None = None

    def __attrs_post_init__(self) -> None:
        """Raises ValueError: it is at odds with itself."""
        versions = {address.version for address in self.addresses} | ({4} if self.dhcp else set())
        for gateway in self.gateways:
            if gateway.version not in versions:
                raise ValueError(f"the gateway {gateway} has no address of its family beside it")
        if len({gateway.version for gateway in self.gateways}) < len(self.gateways):
            raise ValueError("there are two gateways of one family")
        if 6 in versions and self.mtu is not None and self.mtu < IPV6_LEAST_MTU:
            raise ValueError(f"IPv6 needs an MTU of {IPV6_LEAST_MTU} bytes, {self.mtu} is less")
