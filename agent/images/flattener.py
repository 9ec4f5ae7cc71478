"""Directories of layers, flattened into one that is there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from agent.errors import AgentError, failing_as
from agent.images.atomic_file import sync_directory
from agent.images.blob_store import BlobStore
from agent.images.claims import LayerClaims
from agent.images.entry_copy import copy_attributes
from agent.images.erofs import Marks
from agent.images.layer import LayerStore
from agent.images.layer_merge import LayerMerge, Lowerdir, MergeError
from agent.images.tree_removal import remove_tree
from agent.linux.mount import closing, is_mount_root
from agent.linux.syncfs import syncfs
from protocol.errors import ErrorCode

_THREADS = 4
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


class LayerFlattener:
    """Flattens layers, for any number of requests at once, of which each has its own output.

    Of those that are mounted from ``layers``, whose blobs are in ``blobs``, it knows what an image
    of theirs would be like: which directories they have no entry for.
    """

    def __init__(self, blobs: BlobStore, layers: LayerStore, claims: LayerClaims) -> None:
        self._blobs = blobs
        self._layers = layers
        self._claims = claims
        self._outputs: set[Path] = set()
        self._limiter = trio.CapacityLimiter(_THREADS)

    async def flatten(self, lowerdirs: Sequence[str], output: str) -> None:
        """Merge directories, topmost first, by overlayfs's rules into the directory ``output``.

        Entries that are missing or empty are skipped. ``output`` is made with its parents, or is
        there and empty. It gets its name when all of it is on the disk; until then, also over a
        crash, that is ``.NAME.flattening``, beside it, or in it where it is a mount's root.

        Raises:
            AgentError: OVERLAY_FAILED, naming what failed; or INVALID_REQUEST for paths that are
                none. Nothing is left of it.
        """
        if not output or any("\0" in path for path in (output, *lowerdirs)):
            raise AgentError(
                ErrorCode.INVALID_REQUEST,
                "output, lowerdirs: expected paths, got an empty one or one with a NUL",
            )
        doing = f"flatten layers into {output}"
        with failing_as(ErrorCode.OVERLAY_FAILED, doing):
            # Whatever it is called, one request at a time makes it.
            place = await trio.to_thread.run_sync(_resolved, output, limiter=self._limiter)
        if place in self._outputs:
            raise AgentError(
                ErrorCode.OVERLAY_FAILED, f"{doing}: another request is doing that already"
            )
        directories = [Path("/", path) for path in lowerdirs if path]
        self._outputs.add(place)
        try:
            async with self._claims.held(self._digests(directories)):
                with failing_as(ErrorCode.OVERLAY_FAILED, doing):
                    await trio.to_thread.run_sync(
                        self._flatten, directories, place, limiter=self._limiter
                    )
        except MergeError as error:
            raise AgentError(ErrorCode.OVERLAY_FAILED, f"{doing}: {error}") from error
        finally:
            self._outputs.remove(place)

    def _digests(self, directories: Sequence[Path]) -> Iterator[str]:
        """What no collection may take meanwhile: layers of ours are called by their digests."""
        for directory in directories:
            digest = f"sha256:{directory.name}"
            unpacked = self._blobs.unpacked(digest)
            if unpacked is not None:
                yield digest
                yield unpacked.diff_id

    def _flatten(self, directories: Sequence[Path], output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        for directory in directories:
            if output.is_relative_to(directory.resolve()):
                raise MergeError(f"it is in {directory}, which is one of them")
        is_mounted = output.is_dir() and is_mount_root(output)
        partial = (output if is_mounted else output.parent) / f".{output.name}.flattening"
        # One that is there is what a crash has left.
        remove_tree(partial)
        _check_empty(output)
        lowerdirs = [Lowerdir(directory, self._marks(directory)) for directory in directories]
        try:
            partial.mkdir()
            LayerMerge(lowerdirs, partial, trio.from_thread.check_cancelled).run()
            _sync(partial)
            if is_mounted:
                _move_up(partial)
            else:
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


def _resolved(output: str) -> Path:
    return Path("/", output).resolve()


def _check_empty(output: Path) -> None:
    """Tell at once what would be told at the end: rename(2) takes an empty directory's place."""
    try:
        with os.scandir(output) as entries:
            is_empty = next(entries, None) is None
    except FileNotFoundError:
        return
    if not is_empty:
        raise OSError(errno.ENOTEMPTY, "it is there, and not empty")


def _move_up(directory: Path) -> None:
    """Let the directory above, a mount's root, which nothing can replace, be what this one is."""
    above = directory.parent
    with closing(os.open(directory, _DIRECTORY)) as source:
        status = os.fstat(source)
        for path in directory.iterdir():
            path.rename(above / path.name)
        directory.rmdir()
        with closing(os.open(above, _DIRECTORY)) as target:
            copy_attributes(source, status, target)
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.fsync(target)


def _sync(directory: Path) -> None:
    with closing(os.open(directory, _DIRECTORY)) as descriptor:
        syncfs(descriptor)
