"""Where an agent listens, as people write it."""

import attrs

from protocol.values import U32_MAX

_FORMS = "unix:PATH, vsock:CID:PORT or mux:PATH:PORT"


class InvalidAddress(ValueError):
    """Text that is no address; says what one looks like."""


@attrs.frozen
class UnixAddress:
    """A unix socket on this machine."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@attrs.frozen
class VsockAddress:
    """An AF_VSOCK port of a guest, see vsock(7)."""

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock:{self.cid}:{self.port}"


@attrs.frozen
class MuxAddress:
    """A guest's port behind the unix socket of a VMM or of vhost-device-vsock.

    The connector writes ``CONNECT port\\n`` and reads ``OK number\\n``; then it has the stream.
    """

    path: str
    port: int

    def __str__(self) -> str:
        return f"mux:{self.path}:{self.port}"


Address = UnixAddress | VsockAddress | MuxAddress


def beside(address: Address, port: int) -> Address:
    """Where the same agent serves another port: a unix socket's path has that number behind it."""
    if isinstance(address, UnixAddress):
        return UnixAddress(f"{address.path}_{port}")
    return attrs.evolve(address, port=port)


def parse_address(text: str) -> Address:
    """The address that ``unix:PATH``, ``vsock:CID:PORT`` or ``mux:PATH:PORT`` means.

    A path may hold colons. Raises InvalidAddress.
    """
    kind, _, rest = text.partition(":")
    head, _, tail = rest.rpartition(":")
    if kind == "unix" and rest:
        return UnixAddress(rest)
    if kind == "vsock" and _is_u32(head) and _is_u32(tail):
        return VsockAddress(int(head), int(tail))
    if kind == "mux" and head and _is_u32(tail):
        return MuxAddress(head, int(tail))
    raise InvalidAddress(f"{text!r} is no agent address, expected {_FORMS}")


def _is_u32(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) <= U32_MAX
