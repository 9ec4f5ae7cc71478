"""getifaddrs(3): the addresses of this network namespace's interfaces."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface

_PACKED_AT = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
"""Of sockaddr_in and sockaddr_in6: where the address is, and its length."""


class _Ifaddrs(ctypes.Structure):
    pass


_Ifaddrs._fields_ = [
    ("next", ctypes.POINTER(_Ifaddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("destination", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]

_libc = ctypes.CDLL(None, use_errno=True)


def getifaddrs() -> list[tuple[str, IPv4Interface | IPv6Interface]]:
    """The name of an interface and an address of it, for all of both. Raises OSError."""
    first = ctypes.POINTER(_Ifaddrs)()
    if _libc.getifaddrs(ctypes.byref(first)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        return list(_each(first))
    finally:
        _libc.freeifaddrs(first)


def _each(
    entry: ctypes._Pointer[_Ifaddrs],
) -> Iterator[tuple[str, IPv4Interface | IPv6Interface]]:
    while entry:
        found = entry.contents
        address = _packed(found.address)
        mask = _packed(found.netmask)
        if address is not None and mask is not None:
            length = int.from_bytes(mask, "big").bit_count()
            yield found.name.decode(errors="replace"), ip_interface((ip_address(address), length))
        entry = found.next


def _packed(where: int | None) -> bytes | None:
    """The address in a sockaddr; None where there is none of the internet's."""
    if where is None:
        return None
    family = ctypes.c_ushort.from_address(where).value
    if family not in _PACKED_AT:
        return None
    offset, length = _PACKED_AT[socket.AddressFamily(family)]
    return ctypes.string_at(where + offset, length)
