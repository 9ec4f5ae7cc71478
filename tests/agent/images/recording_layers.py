"""A store of layers without EROFS: it unpacks, verifies and remembers, and mounts nothing.

For tests of pulls; the real one needs a newer mkfs.erofs than most machines have, and root.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.images.decompression import Decompression, DecompressionError
from agent.images.layer_build import BuiltLayer, LayerError


class RecordingLayers:
    """`tars` are what was built, by diff_id; `mounted` the (blob digest, diff_id) in order."""

    def __init__(self) -> None:
        self.tars: dict[str, bytes] = {}
        self.mounted: list[tuple[str, str]] = []
        self.written: dict[str, int] = {}
        """How much of a blob has come, by diff_id."""
        self.open_builds = 0
        self.failure: OSError | None = None
        """What the disk says to the next write, if anything."""
        self.busy_for_ever = False
        """Whether writing takes until the build is interrupted."""
        self.changed = threading.Condition()

    def has(self, diff_id: str) -> bool:
        return diff_id in self.tars

    @contextmanager
    def building(
        self, diff_id: str, media_type: str, max_bytes: int | None = None
    ) -> Iterator["RecordingBuild"]:
        self._count(1)
        try:
            yield RecordingBuild(self, diff_id, Decompression(media_type))
        finally:
            self._count(-1)

    def mount(self, blob_digest: str, diff_id: str) -> Path:
        assert diff_id in self.tars
        self.mounted.append((blob_digest, diff_id))
        return Path("/")

    def mounts(self) -> set[str]:
        return {blob_digest for blob_digest, _ in self.mounted}

    def unmount(self, blob_digest: str) -> None:
        self.mounted = [mounted for mounted in self.mounted if mounted[0] != blob_digest]

    def remove(self, diff_id: str) -> int:
        return len(self.tars.pop(diff_id))

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Block until something is so that depends on what is built, 10 s at most."""
        with self.changed:
            assert self.changed.wait_for(is_so, 10)

    def _count(self, builds: int) -> None:
        with self.changed:
            self.open_builds += builds
            self.changed.notify_all()


class RecordingBuild:
    def __init__(self, layers: RecordingLayers, diff_id: str, decompression: Decompression) -> None:
        self._layers = layers
        self._diff_id = diff_id
        self._decompression = decompression
        self._tar = bytearray()
        self._interrupted = threading.Event()

    @property
    def tar_bytes(self) -> int:
        return len(self._tar)

    def write(self, data: bytes) -> None:
        if self._layers.failure is not None:
            raise LayerError(f"{self._diff_id}: disk") from self._layers.failure
        try:
            for chunk in self._decompression.feed(data):
                self._tar += chunk
        except DecompressionError as error:
            raise LayerError(f"{self._diff_id}: {error}") from error
        with self._layers.changed:
            before = self._layers.written.get(self._diff_id, 0)
            self._layers.written[self._diff_id] = before + len(data)
            self._layers.changed.notify_all()
        if self._layers.busy_for_ever:
            assert self._interrupted.wait(10)
            raise LayerError(f"{self._diff_id}: interrupted")

    def finish(self) -> BuiltLayer:
        try:
            for chunk in self._decompression.finish():
                self._tar += chunk
        except DecompressionError as error:
            raise LayerError(f"{self._diff_id}: {error}") from error
        digest = f"sha256:{hashlib.sha256(self._tar).hexdigest()}"
        if digest != self._diff_id:
            raise LayerError(f"{self._diff_id}: the layer's tar has the digest {digest}")
        with self._layers.changed:
            self._layers.tars[self._diff_id] = bytes(self._tar)
            self._layers.changed.notify_all()
        return BuiltLayer(len(self._tar), files=())

    def interrupt(self) -> None:
        self._interrupted.set()
