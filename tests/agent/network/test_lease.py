"""What is made of a DHCP server's answer, which anybody on the link may have written."""

from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from agent.network.lease import lease_of, read_lease


def told(**variables: str) -> str:
    """As dhcp_event.sh writes it."""
    usual = {"client": "7", "at_s": "100.00", "ip": "10.9.0.5", "mask": "24", "lease": "600"}
    return "".join(f"{name}={value}\n" for name, value in {**usual, **variables}.items())


def test_a_lease_has_what_the_server_gave() -> None:
    lease = lease_of(
        told(
            router="10.9.0.1 10.9.0.2",
            dns="10.9.0.53 10.9.0.54",
            search="a.test b.test",
            mtu="1400",
        )
    )
    assert lease.address == IPv4Interface("10.9.0.5/24")
    assert lease.ends_s == 700
    assert (lease.left_s(100.5), lease.left_s(800)) == (599, 0)
    assert lease.gateway == IPv4Address("10.9.0.1")
    assert lease.nameservers == (IPv4Address("10.9.0.53"), IPv4Address("10.9.0.54"))
    assert lease.search == ("a.test", "b.test")
    assert lease.mtu == 1400
    assert lease_of(told(domain="c.test")).search == ("c.test",)


@pytest.mark.parametrize("seconds", ["4294967295", ""])
def test_a_lease_may_be_for_ever(seconds: str) -> None:
    assert lease_of(told(lease=seconds)).left_s(1e9) is None


def test_classless_routes_stand_for_the_router() -> None:
    lease = lease_of(
        told(router="10.9.0.1", staticroutes="10.7.0.0/16 10.9.0.7 0.0.0.0/0 10.9.0.9")
    )
    assert lease.gateway == IPv4Address("10.9.0.9")
    assert lease.routes == ((IPv4Network("10.7.0.0/16"), IPv4Address("10.9.0.7")),)
    none = lease_of(told(router="10.9.0.1", staticroutes="10.7.0.0/16 10.9.0.7"))
    assert none.gateway is None


def test_what_means_nothing_is_left_out_and_the_address_kept() -> None:
    lease = lease_of(
        told(router="bad", dns="bad 10.9.0.53", staticroutes="10.7.0.0/16", mtu="12", search="bad")
    )
    assert lease.address == IPv4Interface("10.9.0.5/24")
    assert (lease.gateway, lease.routes, lease.mtu) == (None, (), None)
    assert lease.nameservers == (IPv4Address("10.9.0.53"),)


@pytest.mark.parametrize("text", ["", "ip=10.9.0.5\n", told(ip="bad"), told(lease="soon")])
def test_what_is_no_lease_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "lease").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_lease(tmp_path / "lease")
    assert read_lease(tmp_path / "none") is None
