"""What the agent answers: one class per status, fields in the order of the wire.

Used qualified (``responses.Ok``), since requests and the workload protocol share names.
"""

import attrs

from protocol.fields import OMITTED, length_only, printable
from protocol.values import I32, U8, U32, U64


@attrs.frozen
class Ok:
    """Done. ``data`` is any JSON value, and may hold values such as ImageInfo when sent."""

    data: object = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class Pong:
    """The agent is there; ``capabilities`` name what it can do beyond protocol version 1, and
    ``config_errors`` say what is wrong with what it was told at its start."""

    version: U32
    capabilities: tuple[str, ...] = attrs.field(default=(), metadata=OMITTED)
    config_errors: tuple[str, ...] = attrs.field(default=(), metadata=OMITTED)


@attrs.frozen
class Progress:
    """How far a pull is; ``layer`` is the digest's hex.

    From ``done_bytes`` on the fields are those of capability ``pull-progress-v1``.
    """

    message: str = attrs.field(converter=printable)
    percent: U8 | None = attrs.field(default=None, metadata=OMITTED)
    layer: str | None = attrs.field(default=None, metadata=OMITTED)
    done_bytes: U64 | None = attrs.field(default=None, metadata=OMITTED)
    total_bytes: U64 | None = attrs.field(default=None, metadata=OMITTED)
    bytes_per_s: U64 | None = attrs.field(default=None, metadata=OMITTED)
    seconds_left: U64 | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class Error:
    """The request failed; ``code`` is an ErrorCode, or one that only a newer agent knows."""

    message: str = attrs.field(converter=printable)
    code: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class Completed:
    """A plain command's end; a truncated stream holds its head only.

    From ``oom`` on the fields are those of capability ``process-stats-v1``, as in ``Exited``.
    """

    exit_code: I32
    stdout: bytes = attrs.field(repr=length_only)
    stderr: bytes = attrs.field(repr=length_only)
    stdout_truncated: bool = attrs.field(default=False, metadata=OMITTED)
    stderr_truncated: bool = attrs.field(default=False, metadata=OMITTED)
    oom: bool | None = attrs.field(default=None, metadata=OMITTED)
    signal: I32 | None = attrs.field(default=None, metadata=OMITTED)
    timed_out: bool = attrs.field(default=False, metadata=OMITTED)
    # Measured, and so never the same twice: answers that differ in nothing else are equal.
    duration_ms: U64 | None = attrs.field(default=None, metadata=OMITTED, eq=False)
    cpu_us: U64 | None = attrs.field(default=None, metadata=OMITTED, eq=False)
    peak_memory_bytes: U64 | None = attrs.field(default=None, metadata=OMITTED, eq=False)


@attrs.frozen
class Started:
    """An interactive command runs."""


@attrs.frozen
class Stdout:
    """Output of an interactive command."""

    data: bytes = attrs.field(repr=length_only)


@attrs.frozen
class Stderr:
    """Error output of an interactive command."""

    data: bytes = attrs.field(repr=length_only)


@attrs.frozen
class Exited:
    """An interactive command's end.

    ``oom``: the kernel killed a process of it for memory; ``signal``: the one that ended it, where
    the agent knows; ``timed_out``: its time limit ended it. ``duration_ms`` is from its start to
    its end, ``cpu_us`` the processor time of all its processes, ``peak_memory_bytes`` the most
    memory that they held.
    """

    exit_code: I32
    oom: bool | None = attrs.field(default=None, metadata=OMITTED)
    signal: I32 | None = attrs.field(default=None, metadata=OMITTED)
    timed_out: bool = attrs.field(default=False, metadata=OMITTED)
    duration_ms: U64 | None = attrs.field(default=None, metadata=OMITTED, eq=False)
    cpu_us: U64 | None = attrs.field(default=None, metadata=OMITTED, eq=False)
    peak_memory_bytes: U64 | None = attrs.field(default=None, metadata=OMITTED, eq=False)


@attrs.frozen
class DataChunk:
    """The next bytes of a file or layer; the last chunk is empty and ``done``.

    That one has the digest and the number of all bytes, where it was asked for.
    """

    data: bytes = attrs.field(repr=length_only)
    done: bool
    sha256: str | None = attrs.field(default=None, metadata=OMITTED)
    size: U64 | None = attrs.field(default=None, metadata=OMITTED)


AgentResponse = (
    Ok | Pong | Progress | Error | Completed | Started | Stdout | Stderr | Exited | DataChunk
)
