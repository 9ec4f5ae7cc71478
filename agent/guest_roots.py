"""Which root a file request's paths are of: the VM's, or a persistent overlay's."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import attrs
import trio

from agent.errors import AgentError, cause_of, failing_as
from agent.files.behind import in_thread
from agent.files.guest_path import GuestPath, GuestRoot, closing
from agent.files.journal import Journal, Note
from agent.files.temporary import Site
from agent.files.view import mounted_view
from agent.gate import Gate
from agent.images.workload_id import InvalidWorkloadId, persistent_workload_id
from agent.processes.standing import StandingContainers
from protocol.errors import ErrorCode

if TYPE_CHECKING:
    from agent.image_services import Images

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_WORKSPACE = GuestPath(("workspace",))
_PERSISTENT = "persistent-"


@attrs.define(eq=False)
class GuestRoots:
    """Opens them for requests, and cleans up in them after agents that were killed."""

    _images: Gate[Images]
    _standing: StandingContainers
    _workspace: Path
    _journal: Journal
    """Of the VM's own files where the storage cannot be had."""
    _expiry_changed: trio.Event = attrs.field(factory=trio.Event)

    @asynccontextmanager
    async def opened(self, persistent_overlay_id: str | None) -> AsyncIterator[Site]:
        """Where the files of a request are, for the block: in the overlay that it names, or the
        only persistent one that is mounted, or the VM.

        Raises:
            AgentError: INVALID_REQUEST for what is no id; FILE_IO_FAILED for an overlay that does
                not exist or cannot be looked into.
        """
        workload = _workload(persistent_overlay_id)
        with ExitStack() as stack:
            site = await self._open(workload, stack)
            try:
                yield site
            finally:
                if site.workload is not None:
                    # The end of a view's namespace takes its time.
                    closing = stack.pop_all()
                    with trio.CancelScope(shield=True):
                        await in_thread(closing.close)

    async def call(
        self, persistent_overlay_id: str | None, work: Callable[[Site], Result]
    ) -> Result:
        """Do in a thread what takes one step only, where a request's files are.

        Raises:
            AgentError: as ``opened``; what ``work`` raises.
        """
        await self._images.decided()
        if persistent_overlay_id is not None or not self._images.is_open:
            async with self.opened(persistent_overlay_id) as site:
                return await in_thread(work, site)
        # In the same thread: to change threads takes longer than to find the root.
        return await in_thread(self._call, self._images.value, work)

    def _call(self, images: Images, work: Callable[[Site], Result]) -> Result:
        with ExitStack() as stack:
            return work(self._enter(images, None, stack))

    async def _open(self, workload: str | None, stack: ExitStack) -> Site:
        await self._images.decided()
        if not self._images.is_open:
            if workload is not None:
                await self._images.passed(ErrorCode.FILE_IO_FAILED)
            return await in_thread(self._enter_vm, self._journal, stack)
        images = self._images.value
        if workload is not None:
            # Idempotent, and nearly free for one that is mounted.
            try:
                await images.overlays.prepare(None, workload)
            except AgentError as error:
                raise AgentError(ErrorCode.FILE_IO_FAILED, error.message) from error
        return await in_thread(self._enter, images, workload, stack)

    def _enter(self, images: Images, workload: str | None, stack: ExitStack) -> Site:
        if workload is None:
            mounted = [name for name in images.overlays.mounted() if name.startswith(_PERSISTENT)]
            if len(mounted) != 1:
                return self._enter_vm(images.journal, stack)
            workload = mounted[0]
        merged = images.overlays.merged(workload)
        with failing_as(ErrorCode.FILE_IO_FAILED, f"look into overlay {workload!r}"):
            root = stack.enter_context(self._overlay(workload, merged))
        return _cleaned(Site(root, workload, images.journal))

    def _enter_vm(self, journal: Journal, stack: ExitStack) -> Site:
        with failing_as(ErrorCode.FILE_IO_FAILED, "open /"):
            return _cleaned(Site(stack.enter_context(GuestRoot.opened("/")), None, journal))

    @contextmanager
    def _overlay(self, workload: str, merged: Path) -> Iterator[GuestRoot]:
        """The root as the newest container sees it, or as one would."""
        container = self._standing.newest(workload)
        if container is not None:
            with ExitStack() as stack:
                try:
                    root = stack.enter_context(_root_of(container.pid))
                except OSError:
                    if not container.has_ended:
                        raise
                else:
                    # Else its pid may be another's by now.
                    if not container.has_ended:
                        yield root
                        return
        # Held, so that nobody removes the overlay meanwhile.
        held = os.open(merged, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with mounted_view(merged, {_WORKSPACE: self._workspace}) as root:
                yield root
        finally:
            os.close(held)

    def expiry_changed(self) -> None:
        """Something was begun or left that is removed when its time has come."""
        self._expiry_changed.set()

    async def keep_clean(self) -> None:
        """For the agent's lifetime: remove what earlier agents left behind, and what arrived of
        uploads that nobody has gone on with for a day."""
        await self._images.decided()
        while True:
            try:
                expiry_s = await in_thread(self._clean)
            except OSError as error:
                # A storage that is gone, when the machine ends. What is left has its note.
                log.warning("clean up after uploads: %s", cause_of(error))
                expiry_s = float("inf")
            with trio.move_on_after(expiry_s):
                await self._expiry_changed.wait()
            self._expiry_changed = trio.Event()

    def _clean(self) -> float:
        """Remove what is due; in how many seconds something will be."""
        journals = [self._journal]
        if self._images.is_open:
            journals.append(self._images.value.journal)
        next_s = float("inf")
        for journal in journals:
            due: dict[str | None, list[Note]] = {}
            for note in journal.notes():
                expiry_s = journal.expires_in_s(note)
                if expiry_s <= 0:
                    due.setdefault(note.workload, []).append(note)
                else:
                    next_s = min(next_s, expiry_s)
            for workload, notes in due.items():
                try:
                    with ExitStack() as stack:
                        root = self._root_to_clean(workload, stack)
                        if root is None:
                            journal.forget(notes)
                        else:
                            journal.clean(root, notes)
                except (OSError, AgentError) as error:
                    where = "the VM" if workload is None else f"overlay {workload!r}"
                    log.warning("clean up after uploads in %s: %s", where, cause_of(error))
        return next_s

    def _root_to_clean(self, workload: str | None, stack: ExitStack) -> GuestRoot | None:
        """The root of a workload, also of one that is not mounted; None: there is none any more."""
        if workload is None:
            return stack.enter_context(GuestRoot.opened("/"))
        overlays = self._images.value.overlays
        if workload in overlays.mounted():
            return stack.enter_context(self._overlay(workload, overlays.merged(workload)))
        upper = overlays.upper(workload)
        if not upper.is_dir():
            return None
        # What was written lies there, and under the names that it has in the overlay.
        return stack.enter_context(mounted_view(upper, {_WORKSPACE: self._workspace}))


@contextmanager
def _root_of(pid: int) -> Iterator[GuestRoot]:
    """What a process sees as its root, in the mount namespace that it is in. Raises OSError."""
    with (
        GuestRoot.opened(f"/proc/{pid}/root") as root,
        closing(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as namespace,
    ):
        yield GuestRoot(root.descriptor, namespace)


def _cleaned(site: Site) -> Site:
    """The same, when what earlier agents left behind there has been removed."""
    left = site.journal.left_behind(site.workload)
    if left:
        site.journal.clean(site.root, left)
    return site


def _workload(persistent_overlay_id: str | None) -> str | None:
    if persistent_overlay_id is None:
        return None
    try:
        return persistent_workload_id(persistent_overlay_id)
    except InvalidWorkloadId as error:
        raise AgentError(ErrorCode.INVALID_REQUEST, f"persistent_overlay_id: {error}") from None
