"""One layer's way into the store: registry -> sha256 -> partial blob -> EROFS image."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from agent.images.atomic_file import Naming
from agent.images.blob_store import BlobStore, UnpackedLayer, WholeLayer
from agent.images.layer import LayerStore
from agent.images.layer_build import BuiltLayer, LayerBuild, LayerError
from agent.images.partial_blob import PartialBlob
from agent.images.persistence import Persistence
from agent.images.registries import MirrorError, RegistryError
from agent.images.resolution import WantedLayer
from protocol import retry

if TYPE_CHECKING:
    from agent.images.blob_body import BlobBody
    from agent.images.mirrored_registry import MirroredRegistry

_BLOCK = 1 << 20


class DamagedBlob(Exception):
    """A blob has not the digest that the manifest gives it; the text says which it has."""


class _BadSource(Exception):
    """What an earlier pull left of the blob, or a mirror gave, was of no use, and is gone."""


class LayerTransfer:
    """Fetches one layer, in a worker thread of trio; used once.

    `on_position` is told, from that thread, how many of the blob's bytes are through, and
    `unpacked_bytes` is what they came to when it has ended. The caller sees that nobody else
    fetches the same layer.
    """

    def __init__(
        self,
        layer: WantedLayer,
        blobs: BlobStore,
        layers: LayerStore,
        client: MirroredRegistry,
        on_position: Callable[[int], None],
    ) -> None:
        self._layer = layer
        self._blobs = blobs
        self._layers = layers
        self._client = client
        self._on_position = on_position
        self.unpacked_bytes = 0
        self._build: LayerBuild | None = None
        self._persistence = Persistence(retry.PULL)

    def run(self) -> WholeLayer:
        """Return when the blob, its EROFS image and its record only lack their names.

        A blob that is complete is not fetched, and one that an earlier pull got a part of is
        fetched from there on. What is there of it stays for the next pull, unless it is of no
        use.

        Raises:
            RegistryError: the registry did not give it.
            DamagedBlob, LayerError: it gave another, or what is inside is not a layer's tar.
            OSError: the store cannot be written to.
            trio.Cancelled: between two blocks, or while waiting.
        """
        if self._blobs.has(self._layer.digest, self._layer.size):
            try:
                return self._rebuild()
            except (DamagedBlob, LayerError):
                if self._blobs.is_intact(self._layer.digest):
                    raise
                # It was verified once; then the disk is to blame, and a fetched one is as good.
                self._blobs.discard(self._layer.digest)
        while True:
            try:
                return self._fetch()
            except _BadSource:
                continue  # which is gone now, so that there is an end

    def interrupt(self) -> None:
        """Let another thread's `run` fail soon, also where one block is long in unpacking."""
        if self._build is not None:
            self._build.interrupt()

    @contextmanager
    def _building(self) -> Iterator[LayerBuild]:
        layer = self._layer
        # What is larger than the disk and does not fill it can only be made to waste time.
        most = self._blobs.capacity_bytes()
        with self._layers.building(layer.diff_id, layer.media_type, most) as self._build:
            try:
                yield self._build
            finally:
                self.unpacked_bytes = self._build.tar_bytes
                self._build = None

    def _fetch(self) -> WholeLayer:
        layer = self._layer
        with self._blobs.open_partial(layer.digest) as partial, self._building() as build:
            stream = _Stream(layer, build, self._on_position)
            resumed = partial.size > 0
            try:
                for block in partial.blocks():
                    stream.feed(block)
                self._download(partial, stream)
                built = stream.finish()
            except (DamagedBlob, LayerError) as error:
                if _is_of_this_machine(error):
                    raise  # what was fetched is not to blame
                partial.discard()
                if self._client.blame(layer.digest) or resumed:
                    # Perhaps only what was there before was no good.
                    raise _BadSource from error
                raise
            return self._whole(built, partial.whole())

    def _download(self, partial: PartialBlob, stream: _Stream) -> None:
        """Get what is missing, in as many requests as it takes and the policy allows."""
        layer = self._layer
        while stream.position < layer.size:
            try:
                with self._client.open_blob(layer.digest, layer.size, stream.position) as body:
                    self._receive(body, partial, stream)
            except MirrorError:
                trio.from_thread.check_cancelled()  # another is asked at once
            except RegistryError as failure:
                if stream.position < layer.size:
                    self._persistence.wait(failure)

    def _receive(self, body: BlobBody, partial: PartialBlob, stream: _Stream) -> None:
        size = self._layer.size
        known = stream.position - body.offset
        try:
            for received in body.blocks():
                # A registry without ranges begins at the first byte again.
                block = received[known:]
                known = max(0, known - len(received))
                stream.feed(block)
                partial.append(block)
        except RegistryError as failure:
            raise RegistryError(
                f"after {stream.position} of {size} bytes: {failure}",
                transient=failure.transient,
                timed_out=failure.timed_out,
            ) from failure
        if stream.position < size:
            raise RegistryError(
                f"body ended after {stream.position} of {size} bytes", transient=True
            )

    def _rebuild(self) -> WholeLayer:
        """Make the EROFS image, which is missing, from the blob, which is not."""
        layer = self._layer
        with self._blobs.path(layer.digest).open("rb") as blob, self._building() as build:
            stream = _Stream(layer, build, self._on_position)
            while block := blob.read(_BLOCK):
                stream.feed(block)
            return self._whole(stream.finish())

    def _whole(self, built: BuiltLayer, blob: Naming | None = None) -> WholeLayer:
        layer = self._layer
        unpacked = UnpackedLayer(layer.diff_id, built.tar_bytes)
        return self._blobs.whole_layer(layer.digest, unpacked, *built.files, blob=blob)


class _Stream:
    """A blob's bytes on their way through the hash into the layer's image."""

    def __init__(
        self, layer: WantedLayer, build: LayerBuild, on_position: Callable[[int], None]
    ) -> None:
        self.position = 0
        self._layer = layer
        self._build = build
        self._on_position = on_position
        self._sha256 = hashlib.sha256()

    def feed(self, block: bytes) -> None:
        trio.from_thread.check_cancelled()
        if self.position + len(block) > self._layer.size:
            raise DamagedBlob(f"body goes on after the manifest's {self._layer.size} bytes")
        self._sha256.update(block)
        with _unless_cancelled():
            self._build.write(block)
        self.position += len(block)
        self._on_position(self.position)

    def finish(self) -> BuiltLayer:
        """The blob is complete: both digests are verified, and the layer's image is made."""
        digest = f"sha256:{self._sha256.hexdigest()}"
        if digest != self._layer.digest:
            raise DamagedBlob(f"its digest is {digest}")
        with _unless_cancelled():
            return self._build.finish()


@contextmanager
def _unless_cancelled() -> Iterator[None]:
    """An interrupted build fails too, and that is no failure of the layer."""
    try:
        yield
    except LayerError:
        trio.from_thread.check_cancelled()
        raise


def _is_of_this_machine(error: BaseException | None) -> bool:
    """Whether an error comes from the operating system, as of a disk or a loop device."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__
    return False


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error comes from a disk or a quota with nothing left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False
