"""A layer in the making: from its blob's bytes to its files."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from agent.errors import cause_of
from agent.images.atomic_file import Naming
from agent.images.decompression import Decompression, DecompressionError
from agent.images.erofs import Marks, append_marks, detached_mount
from agent.images.layer_tar import LayerTarWriter
from agent.images.mkfs_erofs import MkfsErofs, MkfsError
from agent.images.relay import Relay
from agent.images.tar_header import TarError
from agent.images.tar_rewriter import TarRewriter
from agent.linux.mount import closing

_LARGEST_MKFS_BYTES = 1 << 30
_SMALLEST_MKFS_BYTES = 128 << 20
_SMALL_TAR_BYTES = 4 << 20
# Of decompression: 2 MiB at most.
_CHUNKS_AHEAD = 8


class LayerError(Exception):
    """A layer could not be built; the text names its diff_id and the cause.

    ``__cause__`` leads to the OSError where the machine is to blame and not the layer.
    """


@attrs.frozen
class BuiltLayer:
    """The length of a layer's tar, and its files, which lack nothing but their names.

    The names are given in the order of ``files``.
    """

    tar_bytes: int
    files: tuple[Naming, ...]


class LayerBuild:
    """A blob's bytes on their way into a layer's files: decompressed, hashed, mended, written.

    Whoever writes them decompresses. Of a large layer that is the only one under way all else is
    done in a second thread: each half takes about as long, and several would keep the processors
    busy as they are.

    ``tar`` and ``image`` are there, empty; the caller removes what is not finished.
    """

    def __init__(
        self,
        diff_id: str,
        decompression: Decompression,
        tar: Naming,
        image: Naming,
        mkfs_erofs: str,
        max_bytes: int | None,
        is_alone: Callable[[], bool],
    ) -> None:
        self._diff_id = diff_id
        self._decompression = decompression
        self._files = (tar, image)
        self._tar = tar.source
        self._image = image.source
        self._mkfs_erofs = mkfs_erofs
        self._max_bytes = max_bytes
        self._is_alone = is_alone
        self._rewriter = TarRewriter()
        self._writer = LayerTarWriter(tar.source)
        self._sha256 = hashlib.sha256()
        self.tar_bytes = 0
        """How much of the tar has been written."""
        self._relay: Relay | None = None
        self._mkfs: MkfsErofs | None = None
        self._is_interrupted = False
        self.is_finished = False
        """Whether there is a `BuiltLayer`, whose files are the caller's."""

    def write(self, data: bytes) -> None:
        """The blob's next bytes; blocks while the disk is behind.

        Raises:
            LayerError: the layer cannot be built.
        """
        with telling(self._diff_id):
            for chunk in self._decompression.feed(data):
                self._take(chunk)

    def finish(self) -> BuiltLayer:
        """The blob is complete: the layer is checked, and only lacks its name.

        Raises:
            LayerError: the blob holds another tar, or one that cannot be a layer.
        """
        with telling(self._diff_id):
            for chunk in self._decompression.finish():
                self._take(chunk)
            if self._relay is not None:
                self._relay.finish()
            digest = f"sha256:{self._sha256.hexdigest()}"
            if digest != self._diff_id:
                raise LayerError(f"{self._diff_id}: the layer's tar has the digest {digest}")
            for own, piece in self._rewriter.finish():
                self._writer.write(piece, own=own)
            self._writer.finish()
            self._make_image()
        self.is_finished = True
        return BuiltLayer(self.tar_bytes, self._files)

    def interrupt(self) -> None:
        """Make a call that blocks in another thread raise LayerError soon."""
        self._is_interrupted = True
        mkfs = self._mkfs
        if mkfs is not None:
            mkfs.kill()

    def close(self) -> None:
        """End what runs for the build; it can no longer be finished."""
        if self._relay is not None:
            self._relay.close()
        if self._mkfs is not None:
            self._mkfs.close()
        self._writer.close()

    def _take(self, chunk: bytes | memoryview) -> None:
        self._check()
        self.tar_bytes += len(chunk)
        if self._max_bytes is not None and self.tar_bytes > self._max_bytes:
            # Said here before the disk can say it, where what unpacks is ahead of what is written.
            raise LayerError(
                f"{self._diff_id}: it unpacks to more than {self._max_bytes} bytes"
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._relay is not None:
            self._relay.put(chunk)
            return
        self._use(chunk)
        if self.tar_bytes >= _SMALL_TAR_BYTES and self._is_alone():
            self._relay = Relay(self._use, _CHUNKS_AHEAD)

    def _use(self, chunk: bytes | memoryview) -> None:
        self._sha256.update(chunk)
        self._writer.count(chunk)
        for own, piece in self._rewriter.feed(chunk):
            self._writer.write(piece, own=own)

    def _make_image(self) -> None:
        self._mkfs = MkfsErofs(self._mkfs_erofs, self._tar, self._image, _memory_bytes())
        self._check()
        self._mkfs.finish()
        tree = self._rewriter.tree
        with closing(detached_mount(self._image, self._tar)) as root:
            tree.compare(root)
        append_marks(self._image, Marks(tree.implied(), tree.root.opaque))

    def _check(self) -> None:
        if self._is_interrupted:
            raise LayerError(f"{self._diff_id}: it was interrupted")


@contextmanager
def telling(diff_id: str) -> Iterator[None]:
    """Turn all that can go wrong with a layer into one error that names it."""
    try:
        yield
    except (DecompressionError, TarError, MkfsError, OSError) as error:
        raise LayerError(f"{diff_id}: {cause_of(error)}") from error


def _memory_bytes() -> int:
    """What mkfs.erofs may use: a quarter of the machine, since several run at once."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(total // 4, _SMALLEST_MKFS_BYTES), _LARGEST_MKFS_BYTES)
