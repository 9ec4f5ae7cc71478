"""A proxy, and hosts that are reached without it, as the environment variables say them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


class InvalidProxy(ValueError):
    """The text is no proxy that can be used; the message does not quote it, for its password."""


def proxy_url(text: str) -> str:
    """The URL of a proxy that `text` names, with or without its scheme.

    Raises:
        InvalidProxy: it names none.
    """
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if not host or port == 0 or not host.isprintable() or " " in host:
            raise ValueError
        if _address(host) is None:
            host.rstrip(".").encode("idna")
    except ValueError:
        raise InvalidProxy(
            "the proxy is not of the form http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"
        ) from None
    if parts.scheme not in ("http", "https"):
        raise InvalidProxy("the proxy is neither an http:// nor an https:// one")
    return url


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
