"""Commands in containers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import attrs
import trio

from agent.channel import Channel
from agent.errors import AgentError
from agent.handlers.execution import Mode, completed, converse, running_as, seconds
from agent.handlers.images import image_in_use
from agent.images.content_store import StoredImage
from agent.images.workload_id import InvalidWorkloadId, persistent_workload_id
from agent.processes.command import Bind, ContainerCommand, check_words
from agent.processes.running import Running
from agent.processes.standing_container import StandingContainer
from agent.services import Services
from protocol import AgentResponse, requests
from protocol.errors import ErrorCode

# Shared by the VM and all its containers.
WORKSPACE = "/workspace"

# A shell that evaluates its first argument, and if that went well becomes the others. However the
# script ends, in a comment or a here-document, it does not reach what follows; its `set --` is the
# function's, and its `set -e` holds, as it would not to the left of && or ||.
_PREPARING = """\
_innkeep_prepare() { eval "$1
"; }
_innkeep_prepare "$1"
case $? in 0) ;; *) exit ;; esac
shift
exec "$@"
"""


async def run(request: requests.Run, channel: Channel, services: Services) -> AgentResponse:
    mode = Mode.of(request)
    workload = _workload(request, mode)
    async with image_in_use(request.image, services, ErrorCode.INVALID_REQUEST) as image:
        return await _run(request, image, workload, channel, services)


async def _run(
    request: requests.Run,
    image: StoredImage,
    workload: str | None,
    channel: Channel,
    services: Services,
) -> AgentResponse:
    command = ContainerCommand.from_request(
        request.image,
        image.info(),
        request.command,
        request.env,
        workdir=request.workdir,
        user=request.user,
        binds=await _binds(request, services),
        privileged=not request.unprivileged,
        defaults=services.bridges.environment,
    )
    command = _prepared(command, request.remote_volume_mount)
    # A container has the VM's network and name servers: they should be there by then.
    await services.network.decided()
    if workload is None:
        async with _alone(request, command, image, services) as running:
            return await _seen_to_its_end(request, channel, running)
    rootfs = _Rootfs(services, image, workload)
    if Mode.of(request) is Mode.DETACHED:
        return running_as(await services.standing.start_detached(workload, command, rootfs))
    while True:
        async with services.standing.joined(workload, command, rootfs) as container:
            try:
                return await _run_in(container, request, command, channel, services)
            except AgentError:
                # One that ends just then takes nobody in: the command has not run.
                if not container.has_ended:
                    raise


async def _run_in(
    container: StandingContainer,
    request: requests.Run,
    command: ContainerCommand,
    channel: Channel,
    services: Services,
) -> AgentResponse:
    """The command in a container that stays; an AgentError means that it has not been started."""
    where = (container.id, container.pid, container.cgroup.path)
    if Mode.of(request) is Mode.BACKGROUND:
        pid = await services.containers.start_background(
            command,
            *where,
            stdin_data=request.stdin_data,
            timeout_s=seconds(request.timeout_ms),
        )
        return running_as(pid)
    async with services.containers.joining(
        command, *where, takes_stdin=_takes_stdin(request), terminal=request.tty
    ) as running:
        return await _seen_to_its_end(request, channel, running)


@asynccontextmanager
async def _alone(
    request: requests.Run, command: ContainerCommand, image: StoredImage, services: Services
) -> AsyncIterator[Running]:
    """The command in a container of its own, on an overlay of its own."""
    images = await services.images.passed(ErrorCode.RUN_FAILED)
    with _mounting():
        async with (
            images.overlays.ephemeral(image) as overlay,
            services.containers.running(
                command,
                Path(overlay.rootfs_path),
                takes_stdin=_takes_stdin(request),
                terminal=request.tty,
            ) as running,
        ):
            yield running


async def _seen_to_its_end(
    request: requests.Run, channel: Channel, running: Running
) -> AgentResponse:
    if Mode.of(request) is Mode.INTERACTIVE:
        return await converse(request, channel, running.process, running.started)
    timeout_s = seconds(request.timeout_ms)
    return completed(await running.collect(stdin_data=request.stdin_data, timeout_s=timeout_s))


def _takes_stdin(request: requests.Run) -> bool:
    return Mode.of(request) is Mode.INTERACTIVE or request.stdin_data is not None


def _prepared(command: ContainerCommand, script: str | None) -> ContainerCommand:
    """The command with a shell script before it, in its place in the container."""
    if script is None:
        return command
    words = ("sh", "-c", _PREPARING, "sh", script, *command.argv)
    check_words(words)
    return attrs.evolve(command, argv=words)


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
    """What the request wants mounted, and what every container has unless that is in its place."""
    binds: list[Bind] = []
    if request.mounts or services.shares.at_boot:
        binds = await trio.to_thread.run_sync(services.shares.binds, request.mounts)
    workspace = Bind(str(services.disk.workspace), WORKSPACE, gives_way=True)
    if not workspace.is_displaced_by(binds):
        binds.insert(0, workspace)
    # After what they may be within.
    return [*binds, *(bind for bind in services.bridges.binds if not bind.is_displaced_by(binds))]


@contextmanager
def _mounting() -> Iterator[None]:
    """What the host asked for was a container; the overlay is how we make one."""
    try:
        yield
    except AgentError as error:
        if error.code is not ErrorCode.OVERLAY_FAILED:
            raise
        raise AgentError(ErrorCode.MOUNT_FAILED, error.message) from error
