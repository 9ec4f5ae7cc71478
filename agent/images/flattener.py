"""Directories of layers, flattened into one that is there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import trio

from agent.errors import AgentError, failing_as
from agent.images.atomic_file import sync_directory
from agent.images.blob_store import BlobStore
from agent.images.erofs import Marks
from agent.images.layer import LayerStore
from agent.images.layer_merge import LayerMerge, Lowerdir, MergeError
from agent.images.tree_removal import remove_tree
from agent.linux.mount import is_mount_root
from agent.linux.syncfs import syncfs
from protocol.errors import ErrorCode

_THREADS = 4
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


class LayerFlattener:
    """Flattens layers, for any number of requests at once, of which each has its own output.

    Of those that are mounted from ``layers``, whose blobs are in ``blobs``, it knows what an image
    of theirs would be like: which directories they have no entry for.
    """

    def __init__(self, blobs: BlobStore, layers: LayerStore) -> None:
        self._blobs = blobs
        self._layers = layers
        self._outputs: set[Path] = set()
        self._limiter = trio.CapacityLimiter(_THREADS)

    async def flatten(self, lowerdirs: Sequence[str], output: str) -> None:
        """Merge directories, topmost first, by overlayfs's rules into the directory ``output``.

        Entries that are missing or empty are skipped. ``output`` is made with its parents, or is
        there and empty. It gets its name when all of it is on the disk; until then, also over a
        crash, that is ``.NAME.flattening``, beside it.

        Raises:
            AgentError: OVERLAY_FAILED, naming what failed; or INVALID_REQUEST for paths that are
                none. Nothing is left of it.
        """
        if not output or any("\0" in path for path in (output, *lowerdirs)):
            raise AgentError(
                ErrorCode.INVALID_REQUEST,
                "output, lowerdirs: expected paths, got an empty one or one with a NUL",
            )
        directory = _absolute(output)
        layers = [_absolute(path) for path in lowerdirs if path]
        doing = f"flatten layers into {directory}"
        if directory in self._outputs:
            raise AgentError(
                ErrorCode.OVERLAY_FAILED, f"{doing}: another request is doing that already"
            )
        self._outputs.add(directory)
        try:
            with failing_as(ErrorCode.OVERLAY_FAILED, doing):
                await trio.to_thread.run_sync(
                    self._flatten, layers, directory, limiter=self._limiter
                )
        except MergeError as error:
            raise AgentError(ErrorCode.OVERLAY_FAILED, f"{doing}: {error}") from error
        finally:
            self._outputs.remove(directory)

    def _flatten(self, directories: Sequence[Path], output: Path) -> None:
        _check_free(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        for directory in directories:
            if output.resolve().is_relative_to(directory.resolve()):
                raise MergeError(f"it is in {directory}, which is one of them")
        lowerdirs = [Lowerdir(directory, self._marks(directory)) for directory in directories]
        partial = output.with_name(f".{output.name}.flattening")
        # One that is there is what a crash has left.
        remove_tree(partial)
        try:
            partial.mkdir()
            LayerMerge(lowerdirs, partial, trio.from_thread.check_cancelled).run()
            _sync(partial)
            # Replaces a directory that is there, and nothing but an empty one.
            partial.rename(output)
            sync_directory(output.parent)
        except BaseException:
            remove_tree(partial)
            raise

    def _marks(self, directory: Path) -> Marks:
        """What is known of a layer of ours."""
        digest = f"sha256:{directory.resolve().name}"
        unpacked = self._blobs.unpacked(digest)
        if unpacked is None or directory.resolve() != self._layers.directory(digest).resolve():
            return Marks()
        return self._layers.marks(unpacked.diff_id)


def _absolute(path: str) -> Path:
    return Path(os.path.normpath("/" + path.lstrip("/")))


def _check_free(output: Path) -> None:
    """Tell at once what would be told at the end: rename(2) takes an empty directory's place."""
    try:
        with os.scandir(output) as entries:
            is_empty = next(entries, None) is None
    except FileNotFoundError:
        return
    if not is_empty:
        raise OSError(errno.ENOTEMPTY, "it is there, and not empty")
    if is_mount_root(output):
        raise OSError(errno.EBUSY, "something is mounted there; give a directory in it")


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, _DIRECTORY)
    try:
        syncfs(descriptor)
    finally:
        os.close(descriptor)
