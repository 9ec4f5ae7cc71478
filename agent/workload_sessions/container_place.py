"""The container that commands of the workload protocol run in, as the configuration names it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError
from agent.handlers.containers import WORKSPACE
from agent.handlers.images import image_in_use
from agent.images.content_store import StoredImage
from agent.images.workload_id import InvalidWorkloadId, persistent_workload_id
from agent.processes.command import Bind, ContainerCommand
from agent.processes.process import Stdio
from agent.processes.standing_container import StandingContainer
from agent.services import Services
from agent.workload.keeper import Keeper, let
from agent.workload.place import Group, Record, Started, Words
from protocol.errors import ErrorCode


@attrs.frozen(eq=False)
class PersistentContainer:
    """The container of a ``persistent_overlay_id``, started when it is needed and joined."""

    _services: Services
    _image: str
    _overlay: str
    in_container: bool = True

    async def ready(self) -> None:
        """Return when the storage is there, and the network, which containers share, decided."""
        await self._services.images.passed(ErrorCode.RUN_FAILED)
        await self._services.network.decided()

    @asynccontextmanager
    async def running(self, words: Words, *, terminal: bool) -> AsyncIterator[Started]:
        containers = self._services.containers
        while True:
            async with AsyncExitStack() as stack:
                command, container = await stack.enter_async_context(self._joined(words))
                where = (container.id, container.pid, container.cgroup.path)
                try:
                    running = await stack.enter_async_context(
                        containers.joining(command, *where, terminal=terminal)
                    )
                    leader = await running.pid()
                except AgentError:
                    # One that ends just then takes nobody in: the command has not run.
                    if not container.has_ended:
                        raise
                    continue
                process = running.process
                yield Started(process, Group(leader, process.cgroup, in_container=True))
                return

    async def start_kept(
        self, words: Words, stdio: Stdio, keeper: Keeper, record: Record
    ) -> Started:
        while True:
            async with self._joined(words) as (command, container):
                where = (container.id, container.pid, container.cgroup.path)
                try:
                    process, leader = await self._services.containers.start_kept(
                        command,
                        *where,
                        stdio,
                        keeper.start,
                        keeping=keeper.keeping,
                        let=let,
                        record=record,
                    )
                except AgentError:
                    if not container.has_ended:
                        raise
                    keeper.clear()
                    continue
                return Started(process, Group(leader, process.cgroup, in_container=True))

    @asynccontextmanager
    async def _joined(
        self, words: Words
    ) -> AsyncIterator[tuple[ContainerCommand, StandingContainer]]:
        """The command as its image has it, and the container for it to join."""
        services = self._services
        try:
            workload = persistent_workload_id(self._overlay)
        except InvalidWorkloadId as error:
            raise AgentError(ErrorCode.RUN_FAILED, f"innkeep.workload.overlay: {error}") from None
        async with image_in_use(self._image, services, ErrorCode.RUN_FAILED) as image:
            binds = [Bind(str(services.disk.workspace), WORKSPACE, gives_way=True)]
            if services.shares.at_boot:
                mounts = await trio.to_thread.run_sync(services.shares.binds, ())
                binds = [*(bind for bind in binds if not bind.is_displaced_by(mounts)), *mounts]
            command = ContainerCommand.from_request(
                self._image,
                image.info(),
                words.argv,
                words.env,
                workdir=words.workdir,
                binds=binds,
            )

            async def rootfs() -> Path:
                return await self._rootfs(image, workload)

            async with services.standing.joined(workload, command, rootfs) as container:
                yield command, container

    async def _rootfs(self, image: StoredImage, workload: str) -> Path:
        overlays = self._services.images.value.overlays
        return Path((await overlays.prepare(image, workload)).rootfs_path)
