"""What the values of the configuration may look like.

Each reader takes the name that the value was given under, for its messages, and the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from agent.network.uplink_config import Address, Interface
from protocol.values import Mount

T = TypeVar("T")

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_UNITS: Mapping[str, int] = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
# The least that IPv4 allows (RFC 791), and the most that its packets can have.
_MTU = range(68, 65536)


class ConfigError(ValueError):
    """A word or an argument that means nothing; the text names it and what was expected."""


def text(name: str, value: str) -> str:
    return value


def switch(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ConfigError(f"{name}={value}: expected 0 or 1")
    return value == "1"


def log_level(name: str, value: str) -> str:
    if value.upper() not in LOG_LEVELS:
        raise ConfigError(f"{name}={value}: expected one of {', '.join(LOG_LEVELS)}")
    return value.upper()


def time_ns(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal()) or int(value) >= 1 << 63:
        raise ConfigError(f"{name}={value}: expected nanoseconds since 1970")
    return int(value)


def absolute_path(name: str, value: str) -> Path:
    if not value.startswith("/"):
        raise ConfigError(f"{name}={value}: expected a path that begins with /")
    return Path(value)


def boot_mounts(environ: Mapping[str, str]) -> tuple[Mount, ...]:
    """The smolvm launcher's SMOLVM_MOUNT_<i>=<tag>:<path>:ro|rw, of which there are
    SMOLVM_MOUNT_COUNT."""
    name = "SMOLVM_MOUNT_COUNT"
    count = environ.get(name) or "0"
    if not (count.isascii() and count.isdecimal()):
        raise ConfigError(f"{name}={count}: expected a number")
    mounts = []
    for number in range(int(count)):
        each = f"SMOLVM_MOUNT_{number}"
        if each not in environ:
            raise ConfigError(f"{each}: it is missing, of {count} that there are ({name})")
        tag, _, rest = environ[each].partition(":")
        path, _, mode = rest.rpartition(":")
        if not (tag and path.startswith("/") and mode in ("ro", "rw")):
            raise ConfigError(f"{each}={environ[each]}: expected TAG:PATH:ro or TAG:PATH:rw")
        mounts.append(Mount(tag, path, read_only=mode == "ro"))
    return tuple(mounts)


def packed_layers(name: str, value: str) -> Mount:
    """TAG:PATH, as the smolvm launcher has it."""
    tag, _, path = value.rpartition(":")
    if not (tag and path.startswith("/")):
        raise ConfigError(f"{name}={value}: expected TAG:PATH")
    return Mount(tag, path, read_only=True)


def registries(name: str, value: str) -> frozenset[str]:
    hosts = frozenset(host for host in value.split(",") if host)
    for host in hosts:
        if "/" in host:
            raise ConfigError(f"{name}={host}: expected HOST:PORT, without a scheme or a path")
    return hosts


def ca_files(name: str, value: str) -> dict[str, Path]:
    files = {}
    for pair in filter(None, value.split(",")):
        host, separator, path = pair.partition("=")
        if not (host and separator and path):
            raise ConfigError(f"{name}={pair}: expected HOST:PORT=FILE")
        files[host] = Path(path)
    return files


def cids(name: str, value: str) -> frozenset[int]:
    return frozenset(_read(name, cid, int) for cid in value.split(",") if cid)


def memory(name: str, value: str) -> int | Literal["max"]:
    if value == "max":
        return "max"
    number, unit = value[:-1], value[-1:]
    if unit not in _UNITS or not _is_positive(number):
        raise ConfigError(f"{name}={value}: expected a size like 512M (K, M or G), or 'max'")
    return int(number) * _UNITS[unit]


def processes(name: str, value: str) -> int | Literal["max"]:
    if value == "max":
        return "max"
    if not _is_positive(value):
        raise ConfigError(f"{name}={value}: expected a number of processes above 0, or 'max'")
    return int(value)


def addresses(name: str, value: str) -> tuple[Address, ...]:
    return tuple(_read(name, each, ipaddress.ip_address) for each in value.split(",") if each)


def interfaces(name: str, value: str) -> tuple[bool, tuple[Interface, ...]]:
    """Whether ``dhcp`` is among them, and the addresses with their prefix lengths."""
    words = [word for word in value.split(",") if word]
    for word in words:
        if word != "dhcp" and "/" not in word:
            raise ConfigError(f"{name}={word}: expected an address like 10.0.2.15/24, or 'dhcp'")
    addresses = (word for word in words if word != "dhcp")
    return "dhcp" in words, tuple(_read(name, each, ipaddress.ip_interface) for each in addresses)


def mac(name: str, value: str) -> str:
    address = value.lower()
    # The lowest bit of its first octet makes it a group's.
    if not _MAC.fullmatch(address) or int(address[:2], 16) & 1:
        raise ConfigError(f"{name}={value}: expected the address of one like 52:54:00:12:34:56")
    return address


def mtu(name: str, value: str) -> int:
    if not _is_positive(value) or int(value) not in _MTU:
        raise ConfigError(f"{name}={value}: expected a number of bytes from 68 to 65535")
    return int(value)


def _read(name: str, value: str, read: Callable[[str], T]) -> T:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value}: {error}") from error


def _is_positive(value: str) -> bool:
    return value.isascii() and value.isdecimal() and int(value) > 0
