"""The blobs of the OCI image layout, and what is kept beside them.

    blobs/sha256/<hex>     manifests, configs, layers as they travelled: whole and verified
    ingest/<hex>           the beginning of a layer's blob, kept so that its download can go on
    unpacked/<hex>         what only unpacking the layer's blob could tell: the diff_id and the
                           length of the tar inside

The record of a layer is a file of its own and not an annotation of an image, since a layer can be
there before the first image that uses it, and since it ties the blob's digest to the diff_id: of
these an image that merely claims them is not believed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import attrs
import orjson

from agent.images.atomic_file import (
    Naming,
    publish,
    sync_directory,
    write_atomically,
    write_temporary,
)
from agent.images.manifest import DIGEST
from agent.images.partial_blob import PartialBlob

log = logging.getLogger(__name__)


@attrs.frozen
class UnpackedLayer:
    """What unpacking a layer's blob told: the digest and the length in bytes of the tar."""

    diff_id: str = attrs.field(validator=attrs.validators.matches_re(DIGEST.pattern))
    size: int = attrs.field(validator=attrs.validators.instance_of(int))


@attrs.frozen
class WholeLayer:
    """A layer that is whole and verified, and lacks nothing but its files' names.

    ``blob`` is None where it has its name. Without its name a blob is still the beginning of one;
    ``files`` are of no use then, and whoever cannot add the layer calls ``drop``.
    """

    digest: str
    unpacked: UnpackedLayer
    files: tuple[Naming, ...]
    blob: Naming | None

    def drop(self) -> None:
        """Remove those of the files that have no name."""
        for naming in self.files:
            naming.source.unlink(missing_ok=True)


class BlobStore:
    """The blobs in the layout `directory`, made if there is none.

    Any thread may call any method; ``unpacked`` answers from memory, all others use the disk and
    raise OSError. A partial has one user at a time, for which its user sees.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"
        self._ingest = directory / "ingest"
        self._records = directory / "unpacked"
        self._lock = threading.Lock()
        for path in (self._blobs, self._ingest, self._records):
            path.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._unpacked = self._load_records()

    def write(self, path: Path, data: bytes) -> None:
        """Make a file of the layout hold `data`, whole or not at all."""
        write_atomically(path, data, self._ingest)

    def path(self, digest: str) -> Path:
        """Where the blob `sha256:<hex>` is, if it is there: then it is whole and was verified."""
        return self._blobs / _hex(digest)

    def has(self, digest: str, size: int) -> bool:
        """Whether a blob is there with all its bytes."""
        return _size_of(self.path(digest)) == size

    def is_intact(self, digest: str) -> bool:
        """Whether a blob that is there still has its digest: reads all of it."""
        with self.path(digest).open("rb") as blob:
            return hashlib.file_digest(blob, "sha256").hexdigest() == _hex(digest)

    def free_bytes(self) -> int:
        """What may still be written to the file system."""
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def capacity_bytes(self) -> int:
        """The size of the whole file system."""
        status = os.statvfs(self.directory)
        return status.f_blocks * status.f_frsize

    def read_document(self, digest: str) -> bytes | None:
        """A manifest or a config, verified again; None where it is missing or damaged."""
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError:
            return None
        return data if digest_of(data) == digest else None

    def add_document(self, data: bytes) -> str:
        """Keep a manifest or a config; its digest."""
        return self.add_documents((data,))[0]

    def add_documents(self, documents: Iterable[bytes]) -> list[str]:
        """Keep manifests and configs, all or none; their digests."""
        contents = {digest_of(data): data for data in documents}
        namings = []
        try:
            for digest, data in contents.items():
                if self.read_document(digest) is None:
                    namings.append(Naming(write_temporary(data, self._ingest), self.path(digest)))
            for failure in publish([namings]):
                if failure is not None:
                    raise failure
        finally:
            for naming in namings:
                naming.source.unlink(missing_ok=True)
        return list(contents)

    def open_partial(self, digest: str) -> PartialBlob:
        """What there is of a layer's blob, to be continued; the caller closes it."""
        return PartialBlob(self._partial_path(digest), self.path(digest))

    def partial_bytes(self, digest: str) -> int:
        """How much of a layer's blob an earlier download got."""
        return _size_of(self._partial_path(digest)) or 0

    def unpacked(self, digest: str) -> UnpackedLayer | None:
        """What is known of the tar inside a layer's blob."""
        return self._unpacked.get(digest)

    def whole_layer(
        self, digest: str, unpacked: UnpackedLayer, *files: Naming, blob: Naming | None = None
    ) -> WholeLayer:
        """A layer for `add_layers`, with a record of what unpacking its blob told."""
        record = write_temporary(orjson.dumps(attrs.asdict(unpacked)), self._ingest)
        files = (*files, Naming(record, self._records / _hex(digest)))
        return WholeLayer(digest, unpacked, files, blob)

    def add_layers(self, layers: Sequence[WholeLayer]) -> list[OSError | None]:
        """Let layers be in the store, all or nothing of each; what failed for each, if anything."""
        failures = publish(
            [(*layer.files, *([layer.blob] if layer.blob else ())) for layer in layers]
        )
        with self._lock:
            for layer, failure in zip(layers, failures, strict=True):
                if failure is None:
                    self._unpacked[layer.digest] = layer.unpacked
        return failures

    def forget_unpacked(self, digest: str) -> None:
        """Remove the record of a layer's blob, if there is one: it is to be unpacked again."""
        with self._lock:
            self._unpacked.pop(digest, None)
            (self._records / _hex(digest)).unlink(missing_ok=True)

    def discard(self, digest: str) -> None:
        """Remove a blob, its record and its partial; no image and no pull uses them any more."""
        self.forget_unpacked(digest)
        for path in (self.path(digest), self._partial_path(digest)):
            path.unlink(missing_ok=True)

    def cut_back(self, digest: str, length: int) -> None:
        """Leave of a blob, complete or not, only what an earlier download had got of it."""
        if not length:
            self.discard(digest)
            return
        self.forget_unpacked(digest)
        partial = self._partial_path(digest)
        with suppress(FileNotFoundError):
            self.path(digest).replace(partial)
        with suppress(FileNotFoundError):
            os.truncate(partial, min(length, partial.stat().st_size))

    def blob_sizes(self) -> dict[str, int]:
        """All blobs that are there, with their lengths in bytes."""
        return _sizes(self._blobs)

    def partial_sizes(self) -> dict[str, int]:
        """The same of what there is of blobs that are not complete."""
        return _sizes(self._ingest)

    def record_sizes(self) -> dict[str, int]:
        """The same of the records, by their blobs' digests."""
        return _sizes(self._records)

    def _partial_path(self, digest: str) -> Path:
        return self._ingest / _hex(digest)

    def _remove_leftovers(self) -> None:
        """Temporary files of a crash; partials stay, since they are verified before they count."""
        for path in self._ingest.iterdir():
            if not DIGEST.fullmatch(f"sha256:{path.name}"):
                path.unlink()
        sync_directory(self._ingest)

    def _load_records(self) -> dict[str, UnpackedLayer]:
        records = {}
        for path in self._records.iterdir():
            try:
                records[f"sha256:{path.name}"] = UnpackedLayer(**orjson.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                # Without its record a layer is unpacked again by the next pull.
                log.warning("%s is damaged and left out: %s", path, error)
        return records


def digest_of(data: bytes) -> str:
    """The digest of a document, `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _hex(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a sha256 digest")
    return digest.removeprefix("sha256:")


def _sizes(directory: Path) -> dict[str, int]:
    """The lengths of the files that are named by a digest, and so are no temporary ones."""
    sizes = {}
    for entry in os.scandir(directory):
        if DIGEST.fullmatch(digest := f"sha256:{entry.name}"):
            with suppress(FileNotFoundError):  # a pull has just completed it
                sizes[digest] = entry.stat().st_size
    return sizes


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
