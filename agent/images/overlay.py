"""Overlays: an image's layers and an upper directory as one writable tree.

    overlays/<workload id>/merged         the tree, mounted
                           upper work     what was changed in it, and overlayfs's own
                           overlay.json   the image that it is made of: `OverlayRecord`
    overlays/+ephemeral-…                 for one command; or left by a crash
    overlays/+removed-…                   being removed; or left by a crash

No workload id has a plus in it.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from agent.errors import AgentError, cause_of, failing_as
from agent.images.atomic_file import sync_directory
from agent.images.claims import LayerClaims
from agent.images.content_store import StoredImage
from agent.images.layer import LayerStore
from agent.images.layer_stack import LayerStack, StackedLayer
from agent.images.overlay_layers import OverlayLayers
from agent.images.overlay_record import OverlayRecord, read_record, write_record
from agent.images.overlay_users import containers_on
from agent.images.packed_share import PackedShare
from agent.images.tree_removal import remove_tree
from agent.images.workload_id import InvalidWorkloadId, check_workload_id
from agent.linux.mount import (
    MNT_DETACH,
    closing,
    fsconfig_create,
    fsconfig_set_flag,
    fsconfig_set_string,
    fsmount,
    fsopen,
    is_mount_root,
    move_mount,
    umount2,
)
from protocol.errors import ErrorCode
from protocol.values import OverlayInfo

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

_EPHEMERAL = "+ephemeral-"
_REMOVED = "+removed-"

# As docker has them: the upper directory holds all that was changed, whole and without reference
# to the layers, and can be looked at without overlayfs.
_OPTIONS = {"index": "off", "metacopy": "off", "redirect_dir": "nofollow"}

# A command waits for its overlay, so that there are no more of these than commands that start.
_THREADS = 16


class Overlays:
    """The overlays in ``storage_dir``/overlays, made of the layers in ``layers``, and in ``share``.

    What has no record on the disk, or none yet, is among ``claims``.

    Construction makes the directory and removes what a crash left of ephemeral overlays and of
    removals: what ran on them has ended. It blocks, and raises OSError.
    """

    def __init__(
        self,
        storage_dir: Path,
        layers: LayerStore,
        claims: LayerClaims | None = None,
        share: PackedShare | None = None,
    ) -> None:
        self._directory = storage_dir.absolute() / "overlays"
        self._layers = OverlayLayers(layers, share)
        self._claims = claims or LayerClaims()
        self._locks: dict[str, trio.Lock] = {}
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._stacks: dict[tuple[tuple[str, str], ...], LayerStack] = {}
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if path.name.startswith((_EPHEMERAL, _REMOVED)):
                _dispose(path)

    async def prepare(self, image: StoredImage | None, workload_id: str) -> OverlayInfo:
        """The overlay of that id, mounted: made of ``image``, or of what it was made of before.

        ``image`` may be None for an overlay that exists. Idempotent; callers at once get one.

        Raises:
            AgentError: OVERLAY_FAILED.
        """
        doing = f"prepare overlay {workload_id[:200]!r}"
        root = self._root(workload_id, ErrorCode.OVERLAY_FAILED, doing)
        digests = OverlayRecord.of(image).digests if image is not None else ()
        async with self._exclusively(workload_id), self._claims.held(digests):
            with failing_as(ErrorCode.OVERLAY_FAILED, doing):
                return await self._in_thread(self._prepare, root, image)

    async def cleanup(self, workload_id: str) -> None:
        """Unmount and remove an overlay with all that was changed in it; fine if there is none.

        Raises:
            AgentError: CLEANUP_FAILED; something uses it, and it stays, or removing it failed.
        """
        doing = f"clean up overlay {workload_id[:200]!r}"
        root = self._root(workload_id, ErrorCode.CLEANUP_FAILED, doing)
        async with self._exclusively(workload_id):
            with failing_as(ErrorCode.CLEANUP_FAILED, doing):
                await self._in_thread(self._cleanup, root)

    @asynccontextmanager
    async def ephemeral(self, image: StoredImage) -> AsyncIterator[OverlayInfo]:
        """A fresh overlay of an image, gone afterwards in any case. Nothing of it is synced.

        What runs in it has ended by then; what has not keeps the mount, but not its files.

        Raises:
            AgentError: OVERLAY_FAILED.
        """
        root = self._directory / f"{_EPHEMERAL}{secrets.token_hex(8)}"
        record = OverlayRecord.of(image)
        async with self._claims.held(record.digests):
            try:
                with failing_as(ErrorCode.OVERLAY_FAILED, f"make an overlay of {image.reference}"):
                    info = await self._in_thread(self._make_ephemeral, root, record)
                yield info
            finally:
                with trio.CancelScope(shield=True):
                    await self._in_thread(_dispose, root)

    def mounted(self) -> list[str]:
        """The workload ids whose overlays are mounted."""
        return sorted(root.name for root in self._roots() if _is_mounted(root))

    def merged(self, workload_id: str) -> Path:
        """Where an overlay is mounted, if it is."""
        return self._directory / workload_id / "merged"

    def upper(self, workload_id: str) -> Path:
        """The directory of what was changed in an overlay, if there is one."""
        return self._directory / workload_id / "upper"

    def pins(self) -> set[OverlayRecord]:
        """What all overlays with an id are made of, mounted or not. Blocks.

        Raises:
            OSError: a record cannot be read; then nobody knows what is not in use.
        """
        return {record for root in self._roots() if (record := read_record(root)) is not None}

    def unmount_all(self) -> None:
        """Unmount every overlay; the first OSError is raised after the last attempt. Blocks."""
        failure = None
        for root in self._directory.iterdir():
            try:
                if _is_mounted(root):
                    umount2(root / "merged")
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _prepare(self, root: Path, image: StoredImage | None) -> OverlayInfo:
        record = read_record(root)
        if record is None:
            if image is None:
                raise AgentError(
                    ErrorCode.OVERLAY_FAILED,
                    f"prepare overlay {root.name!r}: it does not exist, and its image is not here",
                )
            record = OverlayRecord.of(image)
            stack = self._stack(record)
            for name in ("", "merged", "work"):
                (root / name).mkdir(exist_ok=True)
            # An upper directory that is there, of an agent that kept no records, is taken over.
            if not (root / "upper").exists():
                begun = root / ".upper"
                remove_tree(begun)
                begun.mkdir()
                stack.prepare(begun)
                begun.rename(root / "upper")
            write_record(root, record)
            sync_directory(self._directory)
        if not _is_mounted(root):
            _mount(root, self._stack(record))
        return _info(root)

    def _make_ephemeral(self, root: Path, record: OverlayRecord) -> OverlayInfo:
        stack = self._stack(record)
        for name in ("", "merged", "upper", "work"):
            (root / name).mkdir()
        stack.prepare(root / "upper")
        _mount(root, stack, "volatile")
        return _info(root)

    def _cleanup(self, root: Path) -> None:
        if not root.exists():
            return
        containers = containers_on(root / "upper")
        if containers:
            raise _in_use(root, f"the container of process {containers[0]}")
        if _is_mounted(root):
            try:
                umount2(root / "merged")
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                raise _in_use(root, "a process") from error
        # From here on it is gone, also if the power is.
        removed = self._directory / f"{_REMOVED}{secrets.token_hex(8)}"
        root.rename(removed)
        sync_directory(self._directory)
        remove_tree(removed)

    def _stack(self, record: OverlayRecord) -> LayerStack:
        """The image's layers, all mounted."""
        stacked = []
        for digest, diff_id in record.layers:
            try:
                directory = self._layers.mount(digest, diff_id)
                stacked.append(StackedLayer(directory, self._layers.marks(digest, diff_id)))
            except FileNotFoundError as error:
                raise AgentError(
                    ErrorCode.OVERLAY_FAILED,
                    f"layer {diff_id} is not in the store; pull {record.reference} again",
                ) from error
        # It looks into the layers for what it needs, which is the same each time.
        return self._stacks.setdefault(record.layers, LayerStack.of(stacked))

    def _roots(self) -> list[Path]:
        return [path for path in self._directory.iterdir() if not path.name.startswith("+")]

    def _root(self, workload_id: str, code: ErrorCode, doing: str) -> Path:
        try:
            return self._directory / check_workload_id(workload_id)
        except InvalidWorkloadId as error:
            raise AgentError(code, f"{doing}: {error}") from None

    @asynccontextmanager
    async def _exclusively(self, workload_id: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(workload_id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            statistics = lock.statistics()
            if not statistics.locked and not statistics.tasks_waiting:
                self._locks.pop(workload_id, None)

    async def _in_thread(
        self, work: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result:
        # All of it blocks on the file system, mkdir too: under load for as long as the disk likes.
        return await trio.to_thread.run_sync(work, *arguments, limiter=self._limiter)


def _mount(root: Path, stack: LayerStack, *flags: str) -> None:
    with closing(fsopen("overlay")) as context:
        fsconfig_set_string(context, "source", "overlay")
        for lowerdir in stack.lowerdirs:
            fsconfig_set_string(context, "lowerdir+", lowerdir)
        fsconfig_set_string(context, "upperdir", root / "upper")
        fsconfig_set_string(context, "workdir", root / "work")
        for option, value in _OPTIONS.items():
            fsconfig_set_string(context, option, value)
        for flag in flags:
            fsconfig_set_flag(context, flag)
        fsconfig_create(context)
        with closing(fsmount(context)) as mount_fd:
            move_mount(mount_fd, root / "merged")


def _is_mounted(root: Path) -> bool:
    try:
        return is_mount_root(root / "merged")
    except FileNotFoundError:
        return False


def _dispose(root: Path) -> None:
    """Unmount and remove what nobody has a name for; what remains is removed at the next start."""
    try:
        try:
            umount2(root / "merged")
        except OSError as error:
            if error.errno == errno.EBUSY:
                log.warning("%s is still in use; detaching it", root)
                umount2(root / "merged", MNT_DETACH)
            elif error.errno not in (errno.EINVAL, errno.ENOENT):  # not mounted, not there
                raise
        remove_tree(root)
    except OSError as error:
        log.warning("remove %s: %s", root, cause_of(error))


def _info(root: Path) -> OverlayInfo:
    return OverlayInfo(
        rootfs_path=str(root / "merged"),
        upper_path=str(root / "upper"),
        work_path=str(root / "work"),
    )


def _in_use(root: Path, user: str) -> AgentError:
    return AgentError(
        ErrorCode.CLEANUP_FAILED,
        f"clean up overlay {root.name!r}: {user} is using it; stop that first",
    )
