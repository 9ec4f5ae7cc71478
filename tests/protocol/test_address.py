"""Addresses as people write them."""

import pytest

from protocol.address import (
    Address,
    InvalidAddress,
    MuxAddress,
    UnixAddress,
    VsockAddress,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a.sock", UnixAddress("/run/a.sock")),
        ("unix:relative:with:colons", UnixAddress("relative:with:colons")),
        ("vsock:3:6000", VsockAddress(3, 6000)),
        ("vsock:4294967295:0", VsockAddress(4294967295, 0)),
        ("mux:/run/v.sock:6000", MuxAddress("/run/v.sock", 6000)),
        ("mux:/run/v:1.sock:6000", MuxAddress("/run/v:1.sock", 6000)),
    ],
)
def test_an_address_is_read_and_written_the_same(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix",
        "unix:",
        "/run/a.sock",
        "tcp:localhost:1",
        "vsock:3",
        "vsock::6000",
        "vsock:3:",
        "vsock:-1:6000",
        "vsock:3:0x10",
        "vsock:4294967296:1",
        "vsock:\N{SUPERSCRIPT TWO}:1",
        "mux:/run/v.sock",
        "mux:/run/v.sock:",
        "mux::6000",
        "UNIX:/run/a.sock",
    ],
)
def test_anything_else_is_told_what_an_address_looks_like(text: str) -> None:
    with pytest.raises(InvalidAddress, match="unix:PATH, vsock:CID:PORT or mux:PATH:PORT"):
        parse_address(text)
