"""Layers as EROFS images: built from their tars, kept by diff_id, mounted by blob digest.

    erofs/<hex of the diff_id>.tar      the layer's tar, as `layer_tar` keeps it
    erofs/<hex of the diff_id>.erofs    the tree of its files, the layer's `Marks` behind it: only
                                        with it the layer is there, whole and verified
    erofs/<…>.partial                   being built, or left by a crash
    layers/<hex of the blob's digest>   where it is mounted, read-only

The blob's digest names the mount because hosts look there for what `ImageInfo.layers` lists.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs

from agent.errors import cause_of
from agent.images.atomic_file import Naming
from agent.images.decompression import Decompression, DecompressionError
from agent.images.erofs import Marks, append_marks, detached_mount, read_marks
from agent.images.layer_tar import DamagedTar, LayerTar, LayerTarWriter, open_tar
from agent.images.manifest import DIGEST
from agent.images.mkfs_erofs import MkfsErofs, MkfsError, end_orphan
from agent.images.relay import Relay
from agent.images.tar_header import TarError
from agent.images.tar_rewriter import TarRewriter
from agent.linux.mount import closing, is_mount_root, move_mount, umount2

_LARGEST_MKFS_BYTES = 1 << 30
_SMALLEST_MKFS_BYTES = 128 << 20
_SMALL_TAR_BYTES = 4 << 20
_PARTIAL = ".partial"
# Of decompression: 2 MiB at most.
_CHUNKS_AHEAD = 8


class LayerError(Exception):
    """A layer could not be built; the text names its diff_id and the cause.

    ``__cause__`` leads to the OSError where the machine is to blame and not the layer.
    """


class LayerStore:
    """The layers in ``storage_dir``/erofs and their mounts in ``storage_dir``/layers.

    Construction makes the directories and ends and removes what a crash left of builds, so there
    is one store at a time. ``mkfs_erofs`` is the program (path or name), erofs-utils 1.8.6
    or newer. Every method blocks on the disk, may be called by any thread, and raises OSError.
    """

    def __init__(self, storage_dir: Path, mkfs_erofs: str = "mkfs.erofs") -> None:
        self._images = storage_dir.absolute() / "erofs"
        self._mounts = storage_dir.absolute() / "layers"
        self._mkfs_erofs = mkfs_erofs
        self._mounting = threading.Lock()
        self._marks: dict[str, Marks] = {}
        self._builds: set[LayerBuild] = set()
        self._damaged: dict[str, int] = {}
        """The tars, by diff_id, that the disk has damaged, with their inodes' numbers."""
        for directory in (self._images, self._mounts):
            directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def has(self, diff_id: str) -> bool:
        """Whether the layer was built; then it is whole."""
        try:
            inode = self._tar(diff_id).stat().st_ino
        except FileNotFoundError:
            return False
        return self._image(diff_id).exists() and self._damaged.get(diff_id) != inode

    @contextmanager
    def tar(self, diff_id: str) -> Iterator[LayerTar]:
        """A layer's own tar, for one thread; one that turns out to be damaged is no longer there.

        Raises:
            DamagedTar: the disk has damaged it; also from its blocks.
            OSError: it cannot be read.
        """
        path = self._tar(diff_id)
        try:
            with open_tar(path) as tar:
                yield tar
        except DamagedTar:
            with suppress(FileNotFoundError):
                self._damaged[diff_id] = path.stat().st_ino
            raise

    def sizes(self) -> dict[str, int]:
        """All layers that were built, by diff_id, with the bytes that they take."""
        sizes = {}
        for image in self._images.glob("*.erofs"):
            with suppress(FileNotFoundError):  # removed just now
                sizes[f"sha256:{image.stem}"] = _bytes_of(image, image.with_suffix(".tar"))
        return sizes

    def mounts(self) -> set[str]:
        """The digests of the blobs whose layers are mounted, or were before a reboot."""
        names = (f"sha256:{directory.name}" for directory in self._mounts.iterdir())
        return set(filter(DIGEST.fullmatch, names))

    @contextmanager
    def building(
        self, diff_id: str, media_type: str, max_bytes: int | None = None
    ) -> Iterator[LayerBuild]:
        """Build a layer from its blob, whose bytes go into the `LayerBuild`, which is finished.

        ``max_bytes``, the disk's size, bounds what the blob may hold. Left in any other way,
        nothing stays.

        Raises:
            LayerError: it cannot be built; also from the build's methods.
        """
        partials: list[Path] = []
        is_finished = False
        try:
            with _telling(diff_id):
                partials.extend(self._partial(diff_id) for _ in range(2))
                tar, image = partials
                build = LayerBuild(
                    diff_id,
                    Decompression(media_type),
                    tar,
                    image,
                    self._mkfs_erofs,
                    max_bytes,
                    lambda: len(self._builds) == 1,
                )
            self._builds.add(build)
            try:
                yield build
                is_finished = build.is_finished
            finally:
                self._builds.remove(build)
                build.close()
        finally:
            if not is_finished:
                for partial in partials:
                    partial.unlink(missing_ok=True)

    def remove(self, diff_id: str) -> int:
        """Forget a layer; the bytes that this frees, now or when it is unmounted."""
        files = (self._image(diff_id), self._tar(diff_id))
        freed = _bytes_of(*files)
        for path in files:
            path.unlink()
        self._marks.pop(diff_id, None)
        return freed

    def directory(self, blob_digest: str) -> Path:
        """Where a blob's layer is mounted, if it is."""
        return self._mounts / _hex(blob_digest)

    def mount(self, blob_digest: str, diff_id: str) -> Path:
        """Mount a layer that was built, unless it is mounted; where."""
        directory = self.directory(blob_digest)
        with self._mounting:
            try:
                if is_mount_root(directory):
                    return directory
            except FileNotFoundError:
                directory.mkdir()
            with closing(detached_mount(self._image(diff_id), self._tar(diff_id))) as mount_fd:
                move_mount(mount_fd, directory)
        return directory

    def mount_all(self, layers: Iterable[tuple[str, str]]) -> dict[str, OSError]:
        """Mount (blob digest, diff_id) layers; the failures, by blob digest, stop no others."""
        failures = {}
        for blob_digest, diff_id in layers:
            try:
                self.mount(blob_digest, diff_id)
            except OSError as error:
                failures[blob_digest] = error
        return failures

    def unmount(self, blob_digest: str) -> None:
        """Unmount a layer, if it is mounted; EBUSY while an overlay or a process uses it."""
        self._unmount(self.directory(blob_digest))

    def unmount_all(self) -> None:
        """Unmount every layer; the first failure is raised after the last attempt."""
        failure = None
        for directory in self._mounts.iterdir():
            try:
                self._unmount(directory)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def marks(self, diff_id: str) -> Marks:
        """What a layer means for those below it."""
        marks = self._marks.get(diff_id)
        if marks is None:
            marks = self._marks[diff_id] = read_marks(self._image(diff_id))
        return marks

    def _unmount(self, directory: Path) -> None:
        with self._mounting:
            try:
                if is_mount_root(directory):
                    umount2(directory)
                directory.rmdir()
            except FileNotFoundError:
                return

    def _image(self, diff_id: str) -> Path:
        return self._images / f"{_hex(diff_id)}.erofs"

    def _tar(self, diff_id: str) -> Path:
        return self._images / f"{_hex(diff_id)}.tar"

    def _partial(self, diff_id: str) -> Path:
        descriptor, name = tempfile.mkstemp(prefix=_hex(diff_id), suffix=_PARTIAL, dir=self._images)
        os.close(descriptor)
        return Path(name)

    def _remove_leftovers(self) -> None:
        """What is of no layer: of builds, and a file without the other."""
        for path in list(self._images.iterdir()):
            if path.suffix == _PARTIAL:
                end_orphan(path)
            elif all(path.with_suffix(suffix).exists() for suffix in (".tar", ".erofs")):
                continue
            path.unlink()


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
    """

    def __init__(
        self,
        diff_id: str,
        decompression: Decompression,
        tar: Path,
        image: Path,
        mkfs_erofs: str,
        max_bytes: int | None,
        is_alone: Callable[[], bool],
    ) -> None:
        self._diff_id = diff_id
        self._decompression = decompression
        self._tar = tar
        self._image = image
        self._mkfs_erofs = mkfs_erofs
        self._max_bytes = max_bytes
        self._is_alone = is_alone
        self._rewriter = TarRewriter()
        self._writer = LayerTarWriter(tar)
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
        with _telling(self._diff_id):
            for chunk in self._decompression.feed(data):
                self._take(chunk)

    def finish(self) -> BuiltLayer:
        """The blob is complete: the layer is checked, and only lacks its name.

        Raises:
            LayerError: the blob holds another tar, or one that cannot be a layer.
        """
        with _telling(self._diff_id):
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
        hex_digits = _hex(self._diff_id)
        names = (self._tar.with_name(f"{hex_digits}{suffix}") for suffix in (".tar", ".erofs"))
        namings = zip((self._tar, self._image), names, strict=True)
        return BuiltLayer(self.tar_bytes, tuple(Naming(*naming) for naming in namings))

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
def _telling(diff_id: str) -> Iterator[None]:
    """Turn all that can go wrong with a layer into one error that names it."""
    try:
        yield
    except (DecompressionError, TarError, MkfsError, OSError) as error:
        raise LayerError(f"{diff_id}: {cause_of(error)}") from error


def _memory_bytes() -> int:
    """What mkfs.erofs may use: a quarter of the machine, since several run at once."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(total // 4, _SMALLEST_MKFS_BYTES), _LARGEST_MKFS_BYTES)


def _hex(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a sha256 digest")
    return digest.removeprefix("sha256:")


def _bytes_of(*files: Path) -> int:
    """What files take on the disk, where holes take nothing."""
    statuses = [file.stat() for file in files]
    return sum(min(status.st_size, status.st_blocks * 512) for status in statuses)
