"""Requests about overlays: compose one, remove one."""

from __future__ import annotations

from agent.channel import Channel
from agent.handlers.images import packed_image, parse
from agent.images.content_store import StoredImage
from agent.services import Services
from protocol import AgentResponse, requests, responses
from protocol.errors import ErrorCode


async def prepare_overlay(
    request: requests.PrepareOverlay, channel: Channel, services: Services
) -> AgentResponse:
    code = ErrorCode.OVERLAY_FAILED
    if (packed := await packed_image(services, code)) is not None:
        images = await services.images.passed(code)
        image: StoredImage | None = await packed.image(request.image, code)
    else:
        reference = parse(request.image, code)
        images = await services.images.passed(code)
        # An overlay that exists is pinned to its layers, and needs the image no more.
        image = images.store.find(reference)
    return responses.Ok(await images.overlays.prepare(image, request.workload_id))


async def cleanup_overlay(
    request: requests.CleanupOverlay, channel: Channel, services: Services
) -> AgentResponse:
    images = await services.images.passed(ErrorCode.CLEANUP_FAILED)
    # A container that only waits for commands is the agent's own doing, and no use of the overlay.
    async with services.standing.released(request.workload_id):
        await images.overlays.cleanup(request.workload_id)
    return responses.Ok()
