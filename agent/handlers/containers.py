"""Commands in containers."""

from __future__ import annotations

from pathlib import Path

from agent.channel import Channel
from agent.errors import AgentError
from agent.handlers.images import stored_image
from agent.handlers.processes import completed, refuse_modes, seconds
from agent.processes.command import Bind, ContainerCommand
from agent.services import Services
from protocol import AgentResponse, requests
from protocol.errors import ErrorCode

# Shared by the VM and all its containers.
WORKSPACE = "/workspace"


async def run(request: requests.Run, channel: Channel, services: Services) -> AgentResponse:
    refuse_modes(
        request,
        (
            *("interactive", "tty", "detached", "background"),
            *("persistent_overlay_id", "mounts", "remote_volume_mount"),
        ),
    )
    if not request.unprivileged:
        raise AgentError(
            ErrorCode.INVALID_REQUEST, "unprivileged: false is not supported by this version"
        )
    image = await stored_image(request.image, services, ErrorCode.INVALID_REQUEST)
    command = ContainerCommand.from_request(
        request.image,
        image.info(),
        request.command,
        request.env,
        workdir=request.workdir,
        user=request.user,
        binds=[Bind(str(services.disk.workspace), WORKSPACE)],
    )
    images = await services.images.passed(ErrorCode.RUN_FAILED)
    try:
        async with images.overlays.ephemeral(image) as overlay:
            collected = await services.containers.run(
                command,
                Path(overlay.rootfs_path),
                stdin_data=request.stdin_data,
                timeout_s=seconds(request.timeout_ms),
            )
    except AgentError as error:
        if error.code is ErrorCode.OVERLAY_FAILED:
            # What the host asked for was a container; the overlay is how we make one.
            raise AgentError(ErrorCode.MOUNT_FAILED, error.message) from error
        raise
    return completed(collected)
