"""Hosts that are reached without the proxy, as the environment variable `no_proxy` lists them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def bypasses_proxy(url: str, no_proxy: str) -> bool:
    """Whether `no_proxy` lists the host of a URL.

    Its words, between commas, are as in Go's httpproxy and so in docker: `*`, a domain (for
    itself and all below it; with a leading dot for those below only), an address, or a network
    such as 10.0.0.0/8; each but a network with a port, if only that is meant.
    """
    target = urlsplit(url)
    host = (target.hostname or "").rstrip(".")
    port = str(target.port or (443 if target.scheme == "https" else 80))
    return any(
        _matches(word.strip().lower(), host, port) for word in no_proxy.split(",") if word.strip()
    )


def _matches(word: str, host: str, port: str) -> bool:
    if word == "*":
        return True
    address = _address(host)
    if "/" in word:
        try:
            return address is not None and address in ipaddress.ip_network(word, strict=False)
        except ValueError:
            return False
    name, colon, only_port = word.rpartition(":")
    if colon and only_port.isdecimal() and _address(word) is None:
        if only_port != port:
            return False
        word = name
    if address is not None:
        return _address(word.strip("[]")) == address
    word = word.removeprefix("*")
    return host == word or host.endswith(word if word.startswith(".") else f".{word}")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
