"""Values that messages are made of, and the integers' ranges on the wire."""

from typing import Annotated, Final

import attrs

from protocol.fields import OMITTED, assignments_hidden, hidden


@attrs.frozen
class IntRange:
    """An integer type of the wire; ``words`` name it in error messages."""

    lowest: int
    highest: int
    words: str


U8 = Annotated[int, IntRange(0, 2**8 - 1, "an unsigned 8-bit integer")]
U16 = Annotated[int, IntRange(0, 2**16 - 1, "an unsigned 16-bit integer")]
U32 = Annotated[int, IntRange(0, 2**32 - 1, "an unsigned 32-bit integer")]
U64 = Annotated[int, IntRange(0, 2**64 - 1, "an unsigned 64-bit integer")]
I32 = Annotated[int, IntRange(-(2**31), 2**31 - 1, "a signed 32-bit integer")]
I64 = Annotated[int, IntRange(-(2**63), 2**63 - 1, "a signed 64-bit integer")]

U32_MAX: Final = 2**32 - 1
U64_MAX: Final = 2**64 - 1

EnvVar = tuple[str, str]
"""Name and value of an environment variable; messages show only names in their repr."""


@attrs.frozen
class RegistryAuth:
    """Credentials for one registry."""

    username: str
    password: str = attrs.field(repr=hidden)


@attrs.frozen
class Mount:
    """A virtiofs share in a container; an array of three on the wire."""

    tag: str
    path: str
    read_only: bool


@attrs.frozen
class ImageInfo:
    """An image in the store.

    ``digest`` is the config digest, ``size`` the bytes of the uncompressed layer tars,
    ``layers`` the manifest's layer digests, bottom first, ``env`` ``NAME=value`` strings.
    """

    reference: str
    digest: str
    size: U64
    created: str | None = attrs.field(default=None, kw_only=True)
    architecture: str
    os: str
    layer_count: U64
    layers: tuple[str, ...]
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = attrs.field(default=(), repr=assignments_hidden)
    workdir: str | None = None
    user: str | None = None


@attrs.frozen
class PlannedLayer:
    """A layer that a pull needs: its blob's digest and size, and how much of that is to come."""

    digest: str
    size: U64
    fetch_bytes: U64


@attrs.frozen
class PullPlan:
    """What a ``pull`` with ``dry_run`` would do, capability ``pull-plan-v1``.

    ``digest`` is the config's, as in ImageInfo; ``layers`` are bottom first, each once.
    ``disk_bytes`` is what the disk has to have room for: the blobs, and an estimate of what layers
    unpack to, which nobody knows before.
    """

    reference: str
    digest: str
    platform: str
    layers: tuple[PlannedLayer, ...]
    fetch_bytes: U64
    disk_bytes: U64
    free_bytes: U64


@attrs.frozen
class CollectedGarbage:
    """What a collection removed, or with ``dry_run`` would have.

    ``images`` are the references that were forgotten; ``layers`` are named by their diff_ids,
    ``blobs`` and the ``partial_blobs`` of broken downloads by their own digests. Other agents may
    tell no more than ``freed_bytes``.
    """

    dry_run: bool
    freed_bytes: U64
    images: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    partial_blobs: tuple[str, ...] = ()


@attrs.frozen
class OverlayInfo:
    """Where a prepared overlay is, as absolute paths in the VM."""

    rootfs_path: str
    upper_path: str
    work_path: str


@attrs.frozen
class StorageStatus:
    """The storage; ``ready`` means mounted and usable.

    ``root_error``: why changes to the VM's root are not kept on the disk that is there for them.
    """

    ready: bool
    total_bytes: U64
    used_bytes: U64
    layer_count: U64
    image_count: U64
    root_error: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class NameResolution:
    """The first step to a URL: ``addresses`` are those of its host."""

    ok: bool
    duration_ms: U64
    error: str | None = None
    addresses: tuple[str, ...] = ()


@attrs.frozen
class TcpConnect:
    """The second step: ``address`` is what took the connection, HOST:PORT."""

    ok: bool
    duration_ms: U64
    error: str | None = None
    address: str | None = None


@attrs.frozen
class HttpRequest:
    """The last step: ``status`` is the answer's, any of which tells that the network works."""

    ok: bool
    duration_ms: U64
    error: str | None = None
    status: U16 | None = None


@attrs.frozen
class NetworkReport:
    """How far the VM gets on its way to a URL. ``ok`` is whether all the way; ``problems`` are what
    cannot be had of the network's configuration."""

    ok: bool
    dns: NameResolution
    tcp: TcpConnect
    http: HttpRequest
    problems: tuple[str, ...] = attrs.field(default=(), metadata=OMITTED)


@attrs.frozen(kw_only=True)
class ClockStep:
    """By how much the clock was set forward, or back where that is negative.

    ``source`` is what told the host's time: ptp_kvm, request, rtc; null where nothing did.
    """

    ok: bool
    source: str | None
    step_ns: I64
    error: str | None = None


@attrs.frozen(kw_only=True)
class Reseeding:
    """How many bytes that only the host knew went into the generator of random numbers.

    ``source`` is where they came from: request or hwrng; null where there were none.
    """

    ok: bool
    source: str | None
    credited_bytes: U64
    error: str | None = None


@attrs.frozen(kw_only=True)
class MountCheck:
    """Whether the storage can be written to, and every share answers; ``checked`` are these."""

    ok: bool
    checked: tuple[str, ...]
    error: str | None = None


@attrs.frozen(kw_only=True)
class NetworkCheck:
    """Whether the network is as the boot configuration wants it."""

    ok: bool
    error: str | None = None


@attrs.frozen(kw_only=True)
class Resumption:
    """What was done after a pause, step by step. ``ok`` is whether all of it went well."""

    ok: bool
    clock: ClockStep
    randomness: Reseeding
    mounts: MountCheck
    network: NetworkCheck


@attrs.frozen(kw_only=True)
class FileInfo:
    """What lstat(2) or stat(2) tells of a file; ``mode`` are permission bits.

    ``kind`` is file, directory, symlink, fifo, socket, block or char; ``mtime_ns`` are the
    nanoseconds beside the whole seconds, ``target`` is what a symbolic link says. ``escaped``: a
    name or target has bytes that are not UTF-8, written as ``\\xNN``.
    """

    kind: str
    size: U64
    mode: U32
    uid: U32
    gid: U32
    mtime_s: I64
    mtime_ns: U32
    target: str | None = attrs.field(default=None, metadata=OMITTED)
    escaped: bool = attrs.field(default=False, metadata=OMITTED)


@attrs.frozen(kw_only=True)
class FileEntry(FileInfo):
    """The same of one of a directory's entries."""

    name: str
