"""Commands in containers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from agent.channel import Channel
from agent.errors import AgentError
from agent.handlers.execution import Mode, completed, converse, running_as, seconds
from agent.handlers.images import stored_image
from agent.images.content_store import StoredImage
from agent.images.workload_id import InvalidWorkloadId, persistent_workload_id
from agent.processes.command import Bind, ContainerCommand
from agent.processes.container import Running
from agent.services import Services
from protocol import AgentResponse, requests
from protocol.errors import ErrorCode

# Shared by the VM and all its containers.
WORKSPACE = "/workspace"


async def run(request: requests.Run, channel: Channel, services: Services) -> AgentResponse:
    mode = Mode.of(request)
    workload = _workload(request, mode)
    image = await stored_image(request.image, services, ErrorCode.INVALID_REQUEST)
    command = ContainerCommand.from_request(
        request.image,
        image.info(),
        request.command,
        request.env,
        workdir=request.workdir,
        user=request.user,
        binds=await _binds(request, services),
        privileged=not request.unprivileged,
        preparation=request.remote_volume_mount,
    )
    # A container has the VM's network and name servers: they should be there by then.
    await services.network.decided()
    timeout_s = seconds(request.timeout_ms)
    if workload is not None and mode is Mode.DETACHED:
        rootfs = _Rootfs(services, image, workload)
        return running_as(await services.standing.start_detached(workload, command, rootfs))
    if workload is not None and mode is Mode.BACKGROUND:
        async with services.standing.joined(
            workload, command, _Rootfs(services, image, workload)
        ) as container:
            pid = await services.containers.start_background(
                command,
                container.id,
                container.pid,
                container.cgroup.path,
                stdin_data=request.stdin_data,
                timeout_s=timeout_s,
            )
        return running_as(pid)
    async with _running(request, command, image, workload, mode, services) as running:
        if mode is Mode.INTERACTIVE:
            return await converse(request, channel, running.process, running.started)
        return completed(await running.collect(stdin_data=request.stdin_data, timeout_s=timeout_s))


@asynccontextmanager
async def _running(
    request: requests.Run,
    command: ContainerCommand,
    image: StoredImage,
    workload: str | None,
    mode: Mode,
    services: Services,
) -> AsyncIterator[Running]:
    """The command in its container: one of its own, or that of the workload."""
    takes_stdin = mode is Mode.INTERACTIVE or request.stdin_data is not None
    terminal = request.tty
    if workload is None:
        images = await services.images.passed(ErrorCode.RUN_FAILED)
        with _mounting():
            async with (
                images.overlays.ephemeral(image) as overlay,
                services.containers.running(
                    command, Path(overlay.rootfs_path), takes_stdin=takes_stdin, terminal=terminal
                ) as running,
            ):
                yield running
        return
    async with (
        services.standing.joined(
            workload, command, _Rootfs(services, image, workload)
        ) as container,
        services.containers.joining(
            command,
            container.id,
            container.pid,
            container.cgroup.path,
            takes_stdin=takes_stdin,
            terminal=terminal,
        ) as running,
    ):
        yield running


class _Rootfs:
    """Mounts a persistent overlay when a container is to be started on it."""

    def __init__(self, services: Services, image: StoredImage, workload: str) -> None:
        self._services = services
        self._image = image
        self._workload = workload

    async def __call__(self) -> Path:
        images = await self._services.images.passed(ErrorCode.RUN_FAILED)
        with _mounting():
            overlay = await images.overlays.prepare(self._image, self._workload)
        return Path(overlay.rootfs_path)


def _workload(request: requests.Run, mode: Mode) -> str | None:
    """The workload that the request means, if it means one that stays."""
    if request.persistent_overlay_id is None:
        if mode in (Mode.DETACHED, Mode.BACKGROUND):
            raise AgentError(
                ErrorCode.INVALID_REQUEST,
                f"{mode.name.lower()}: needs persistent_overlay_id, for what outlives its request "
                "needs an overlay that does",
            )
        return None
    try:
        return persistent_workload_id(request.persistent_overlay_id)
    except InvalidWorkloadId as error:
        raise AgentError(ErrorCode.INVALID_REQUEST, f"persistent_overlay_id: {error}") from None


async def _binds(request: requests.Run, services: Services) -> list[Bind]:
    """What the request wants mounted, and the workspace unless that is elsewhere then."""
    binds = [await trio.to_thread.run_sync(services.shares.bind, mount) for mount in request.mounts]
    if all(bind.destination != WORKSPACE for bind in binds):
        workspace = Bind(str(services.disk.workspace), WORKSPACE, gives_way=True)
        binds.insert(0, workspace)
    return binds


@contextmanager
def _mounting() -> Iterator[None]:
    """What the host asked for was a container; the overlay is how we make one."""
    try:
        yield
    except AgentError as error:
        if error.code is not ErrorCode.OVERLAY_FAILED:
            raise
        raise AgentError(ErrorCode.MOUNT_FAILED, error.message) from error
