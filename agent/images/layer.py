"""Layers as EROFS images: built from their tars, kept by diff_id, mounted by blob digest.

    erofs/<hex of the diff_id>.tar      the layer's tar, as `layer_tar` keeps it
    erofs/<hex of the diff_id>.erofs    the tree of its files, the layer's `Marks` behind it: only
                                        with it the layer is there, whole and verified
    erofs/<…>.partial                   being built, or left by a crash
    layers/<hex of the blob's digest>   where it is mounted, read-only

The blob's digest names the mount because hosts look there for what `ImageInfo.layers` lists. So
does the name of a directory in a packed share (`packed_share.py`).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from agent.images.atomic_file import Naming
from agent.images.decompression import Decompression
from agent.images.erofs import Marks, detached_mount, read_marks
from agent.images.layer_build import LayerBuild, telling
from agent.images.layer_tar import DamagedTar, LayerTar, open_tar
from agent.images.manifest import DIGEST
from agent.images.mkfs_erofs import end_orphan
from agent.linux.mount import closing, is_mount_root, move_mount, umount2

_PARTIAL = ".partial"


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
        self._whole: set[str] = set()
        """The layers that were seen to be there: nobody else removes any."""
        self._damaged: dict[str, int] = {}
        """The tars, by diff_id, that the disk has damaged, with their inodes' numbers."""
        for directory in (self._images, self._mounts):
            directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def has(self, diff_id: str) -> bool:
        """Whether the layer was built; then it is whole."""
        if diff_id in self._whole:
            return True
        try:
            inode = self._tar(diff_id).stat().st_ino
        except FileNotFoundError:
            return False
        if not self._image(diff_id).exists() or self._damaged.get(diff_id) == inode:
            return False
        self._whole.add(diff_id)
        return True

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
            self._whole.discard(diff_id)
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
        with ExitStack() as leftovers:
            with telling(diff_id):
                tar = self._partial(self._tar(diff_id), leftovers)
                image = self._partial(self._image(diff_id), leftovers)
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
                if build.is_finished:
                    leftovers.pop_all()
            finally:
                self._builds.remove(build)
                build.close()

    def remove(self, diff_id: str) -> int:
        """Forget a layer; the bytes that this frees, now or when it is unmounted."""
        self._whole.discard(diff_id)
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
        make = partial(detached_mount, self._image(diff_id), self._tar(diff_id))
        return self._attach(self.directory(blob_digest), make)

    def attach(self, name: str, make: Callable[[], int]) -> Path:
        """Have what ``make`` mounts among the layers, as ``name``, unless it is there; where."""
        return self._attach(self._mounts / name, make)

    def _attach(self, directory: Path, make: Callable[[], int]) -> Path:
        with self._mounting:
            try:
                if is_mount_root(directory):
                    return directory
            except FileNotFoundError:
                directory.mkdir()
            with closing(make()) as mount_fd:
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

    def _partial(self, path: Path, leftovers: ExitStack) -> Naming:
        """A new file that is to have a name; ``leftovers`` removes it."""
        descriptor, name = tempfile.mkstemp(prefix=path.stem, suffix=_PARTIAL, dir=self._images)
        os.close(descriptor)
        partial = Path(name)
        leftovers.callback(partial.unlink, missing_ok=True)
        return Naming(partial, path)

    def _remove_leftovers(self) -> None:
        """What is of no layer: of builds, and a file without the other."""
        for path in list(self._images.iterdir()):
            if path.suffix == _PARTIAL:
                end_orphan(path)
            elif all(path.with_suffix(suffix).exists() for suffix in (".tar", ".erofs")):
                continue
            path.unlink()


def _hex(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is not a sha256 digest")
    return digest.removeprefix("sha256:")


def _bytes_of(*files: Path) -> int:
    """What files take on the disk, where holes take nothing."""
    statuses = [file.stat() for file in files]
    return sum(min(status.st_size, status.st_blocks * 512) for status in statuses)
