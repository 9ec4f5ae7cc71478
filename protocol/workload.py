"""The workload protocol: what a host and the VM's workload control say to each other.

Used qualified (``workload.Run``), since the agent protocol shares names.
"""

import attrs

from protocol.fields import OMITTED, hidden, length_only, names_only, printable
from protocol.values import I32, U32, U64, EnvVar


@attrs.frozen
class Auth:
    """The first message of every connection."""

    token: str = attrs.field(repr=hidden)
    protocol_version: U32
    follow: bool = attrs.field(default=True, metadata=OMITTED)
    """On the log's port: whether what is written from then on is wanted, too."""


@attrs.frozen
class Run:
    """Start the workload."""

    request_id: U64
    command: tuple[str, ...]
    env: tuple[EnvVar, ...] = attrs.field(repr=names_only)
    workdir: str | None = None


@attrs.frozen
class Exec:
    """Start a further command beside the workload."""

    request_id: U64
    command: tuple[str, ...]
    tty: bool


@attrs.frozen
class Signal:
    """Send a signal to the process group of a request."""

    request_id: U64
    signal: I32


@attrs.frozen
class Stop:
    """TERM to all, KILL after the time limit."""

    timeout_ms: U64


HostMessage = Auth | Run | Exec | Signal | Stop


@attrs.frozen
class AuthOk:
    """The token was right."""


@attrs.frozen
class AuthFailed:
    """The token was wrong, late or missing; the connection closes."""


@attrs.frozen
class Ready:
    """Commands can be run."""


@attrs.frozen
class Started:
    """The request's command runs."""

    request_id: U64


@attrs.frozen
class Stdout:
    """Output; ``truncated``: bytes before it were dropped, the reader was slow."""

    request_id: U64
    data: bytes = attrs.field(repr=length_only)
    truncated: bool


@attrs.frozen
class Stderr:
    """Error output; ``truncated`` as for Stdout."""

    request_id: U64
    data: bytes = attrs.field(repr=length_only)
    truncated: bool


@attrs.frozen
class Exit:
    """The request's command ended; ``code`` is 128+n after signal n."""

    request_id: U64
    code: I32
    reason: str


@attrs.frozen
class Error:
    """A request failed, or, without an id, the connection did."""

    request_id: U64 | None = attrs.field(default=None, kw_only=True)
    message: str = attrs.field(converter=printable)


GuestMessage = AuthOk | AuthFailed | Ready | Started | Stdout | Stderr | Exit | Error
