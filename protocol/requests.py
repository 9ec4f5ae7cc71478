"""What a host asks of the agent: one class per method, fields in the order of the wire.

Used qualified (``requests.Run``), since answers and the workload protocol share names.
"""

import attrs

from protocol.fields import OMITTED, length_only, names_only, without_credentials
from protocol.values import I64, U16, U32, U64, EnvVar, Mount, RegistryAuth


@attrs.frozen
class Ping:
    """Answered by ``pong``."""


@attrs.frozen
class Pull:
    """Fetch an image; ``proxy`` and ``no_proxy`` as the environment variables of those names.

    With ``dry_run`` nothing is fetched but what tells the layers' sizes, and the answer's data is
    a PullPlan.
    """

    image: str
    oci_platform: str | None = None
    auth: RegistryAuth | None = attrs.field(default=None, metadata=OMITTED)
    proxy: str | None = attrs.field(default=None, metadata=OMITTED, repr=without_credentials)
    no_proxy: str | None = attrs.field(default=None, metadata=OMITTED)
    dry_run: bool = attrs.field(default=False, metadata=OMITTED)


@attrs.frozen
class Query:
    """The stored image of this reference."""

    image: str


@attrs.frozen
class ListImages:
    """All stored images."""


@attrs.frozen
class GarbageCollect:
    """Remove what nothing refers to; ``purge_all`` forgets all images first."""

    dry_run: bool
    purge_all: bool = False


@attrs.frozen
class PrepareOverlay:
    """Mount a workload's overlay, made from the image if it is new."""

    image: str
    workload_id: str


@attrs.frozen
class CleanupOverlay:
    """Unmount and remove a workload's overlay."""

    workload_id: str


@attrs.frozen
class FormatStorage:
    """Make the storage usable where it is empty."""


@attrs.frozen
class StorageStatus:
    """How full the storage is."""


@attrs.frozen
class NetworkTest:
    """Try name resolution, TCP and HTTP to a URL."""

    url: str = attrs.field(repr=without_credentials)


@attrs.frozen
class VmStats:
    """What the VM, its containers and its commands in the background use."""


@attrs.frozen
class Diagnose:
    """How the VM is, and what went wrong in it."""


@attrs.frozen
class Shutdown:
    """Stop everything, sync, answer, power off."""


@attrs.frozen
class Resumed:
    """The VM was paused, moved or made from a snapshot: set right what only the host can know of.

    ``time_ns`` is the host's time, in nanoseconds since 1970; ``entropy`` are bytes that nobody
    else has got.
    """

    time_ns: U64 | None = attrs.field(default=None, metadata=OMITTED)
    entropy: bytes | None = attrs.field(default=None, metadata=OMITTED, repr=length_only)


@attrs.frozen
class ExportLayer:
    """A layer's uncompressed tar; ``image_digest`` is the config digest, index 0 the bottom."""

    image_digest: str
    layer_index: U64


@attrs.frozen
class VmExec:
    """Run a command in the VM itself, as root."""

    command: tuple[str, ...]
    env: tuple[EnvVar, ...] = attrs.field(default=(), repr=names_only)
    workdir: str | None = None
    timeout_ms: U64 | None = None
    interactive: bool = False
    tty: bool = False
    background: bool = False
    stdin_data: str | None = attrs.field(default=None, metadata=OMITTED, repr=length_only)


@attrs.frozen
class Run:
    """Run a command in a container of the image.

    ``remote_volume_mount`` is a shell script, ``unprivileged=False`` lifts docker's limits.
    """

    image: str
    command: tuple[str, ...]
    env: tuple[EnvVar, ...] = attrs.field(default=(), repr=names_only)
    workdir: str | None = None
    user: str | None = attrs.field(default=None, metadata=OMITTED)
    mounts: tuple[Mount, ...] = ()
    timeout_ms: U64 | None = None
    interactive: bool = False
    tty: bool = False
    detached: bool = False
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)
    background: bool = False
    stdin_data: str | None = attrs.field(default=None, metadata=OMITTED, repr=length_only)
    # A script that mounts remote volumes carries their keys.
    remote_volume_mount: str | None = attrs.field(default=None, metadata=OMITTED, repr=length_only)
    unprivileged: bool = attrs.field(default=True, metadata=OMITTED)


@attrs.frozen
class Stdin:
    """Input for the running session, no answer; empty data is the end of input."""

    data: bytes = attrs.field(repr=length_only)


@attrs.frozen
class Resize:
    """The session's terminal has a new size, no answer."""

    cols: U16
    rows: U16


@attrs.frozen
class FileWrite:
    """A whole small file; ``mode`` are permission bits, ``sha256`` is the data's in hexadecimal.

    With ``digest`` the answer tells what was written. ``mtime_s`` and ``mtime_ns`` are when it was
    changed last; the latter below a thousand million.
    """

    path: str
    data: bytes = attrs.field(repr=length_only)
    mode: U32 | None = None
    uid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    gid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)
    sha256: str | None = attrs.field(default=None, metadata=OMITTED)
    digest: bool = attrs.field(default=False, metadata=OMITTED)
    mtime_s: I64 | None = attrs.field(default=None, metadata=OMITTED)
    mtime_ns: U32 | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class FileWriteBegin:
    """The start of a streamed upload of ``total_size`` bytes; fields as in ``FileWrite``.

    With ``resume`` what arrived of the same upload before is kept, and the answer says how much.
    """

    path: str
    mode: U32 | None = attrs.field(default=None, kw_only=True)
    total_size: U64
    uid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    gid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)
    sha256: str | None = attrs.field(default=None, metadata=OMITTED)
    digest: bool = attrs.field(default=False, metadata=OMITTED)
    mtime_s: I64 | None = attrs.field(default=None, metadata=OMITTED)
    mtime_ns: U32 | None = attrs.field(default=None, metadata=OMITTED)
    resume: bool = attrs.field(default=False, metadata=OMITTED)


@attrs.frozen
class FileWriteChunk:
    """The next bytes of the upload; ``done`` with the last."""

    data: bytes = attrs.field(repr=length_only)
    done: bool


@attrs.frozen
class FileRead:
    """A regular file's contents, as data chunks: all of them, or ``length`` bytes from ``offset``.

    With ``digest`` the last chunk tells what was sent.
    """

    path: str
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)
    offset: U64 | None = attrs.field(default=None, metadata=OMITTED)
    length: U64 | None = attrs.field(default=None, metadata=OMITTED)
    digest: bool = attrs.field(default=False, metadata=OMITTED)


@attrs.frozen
class FileStat:
    """What is at a path; with ``follow`` what a symbolic link there leads to."""

    path: str
    follow: bool = attrs.field(default=False, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class FileList:
    """A directory's entries in the order of their names, the first ``limit`` behind ``after``."""

    path: str
    after: str | None = attrs.field(default=None, metadata=OMITTED)
    limit: U32 | None = attrs.field(default=None, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class FileRemove:
    """Remove a file, a link or a directory, which must be empty unless ``recursive``."""

    path: str
    recursive: bool = attrs.field(default=False, metadata=OMITTED)
    missing_ok: bool = attrs.field(default=False, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class FileMkdir:
    """Make a directory and its missing parents; ``mode`` are permission bits."""

    path: str
    mode: U32 | None = attrs.field(default=None, metadata=OMITTED)
    uid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    gid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class TarWrite:
    """Unpack a tar stream, which follows in chunks as of an upload, into a directory.

    With ``uid`` or ``gid`` all that is made is that user's and group's, not the stream's.
    """

    path: str
    uid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    gid: U32 | None = attrs.field(default=None, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class TarRead:
    """A directory, or a file, as a tar stream in data chunks, at its top ``name`` or else ``.``."""

    path: str
    name: str | None = attrs.field(default=None, metadata=OMITTED)
    persistent_overlay_id: str | None = attrs.field(default=None, metadata=OMITTED)


@attrs.frozen
class FlattenLayers:
    """Merge directories by overlay rules, topmost first, into the directory ``output``."""

    lowerdirs: tuple[str, ...]
    output: str


AgentRequest = (
    Ping
    | Pull
    | Query
    | ListImages
    | GarbageCollect
    | PrepareOverlay
    | CleanupOverlay
    | FormatStorage
    | StorageStatus
    | NetworkTest
    | Shutdown
    | Resumed
    | ExportLayer
    | VmExec
    | Run
    | Stdin
    | Resize
    | FileWrite
    | FileWriteBegin
    | FileWriteChunk
    | FileRead
    | FileStat
    | FileList
    | FileRemove
    | FileMkdir
    | TarWrite
    | TarRead
    | FlattenLayers
    | VmStats
    | Diagnose
)
