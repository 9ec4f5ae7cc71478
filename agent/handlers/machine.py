"""Requests about the machine itself: its storage, its end."""

from __future__ import annotations

import attrs
import trio

from agent.channel import Channel
from agent.errors import AgentError, failing_as
from agent.services import Services
from agent.storage.usage import usage_of
from protocol import AgentResponse, requests, responses, values
from protocol.errors import ErrorCode

MOST_ENTROPY_BYTES = 4096


async def storage_status(
    request: requests.StorageStatus, channel: Channel, services: Services
) -> AgentResponse:
    try:
        images = await services.images.passed(ErrorCode.STATUS_FAILED)
    except AgentError:
        # Why it is not is in the log, and in the answer of each request that needs it.
        return responses.Ok(
            values.StorageStatus(
                ready=False,
                total_bytes=0,
                used_bytes=0,
                layer_count=0,
                image_count=0,
                root_error=services.config.root_error,
            )
        )
    with failing_as(ErrorCode.STATUS_FAILED, f"measure {services.config.storage_dir}"):
        usage = usage_of(services.config.storage_dir)
    problem = await services.write_problem()
    stored = images.store.images()
    return responses.Ok(
        values.StorageStatus(
            ready=problem is None,
            total_bytes=usage.total_bytes,
            used_bytes=usage.used_bytes,
            layer_count=len({layer.diff_id for image in stored for layer in image.layers}),
            image_count=len(stored),
            root_error=services.config.root_error,
        )
    )


async def format_storage(
    request: requests.FormatStorage, channel: Channel, services: Services
) -> AgentResponse:
    """Bring up what boot could not; storage that is up keeps its data and gets its layout."""
    with trio.CancelScope(shield=True):
        try:
            await services.bring_up_images()
        except AgentError as error:
            raise AgentError(ErrorCode.FORMAT_FAILED, error.message) from error
    return responses.Ok()


async def network_test(
    request: requests.NetworkTest, channel: Channel, services: Services
) -> AgentResponse:
    # Also where it could not be brought up: the report says what that means.
    await services.network.decided()
    report = await services.probe.report(request.url)
    return responses.Ok(attrs.evolve(report, problems=services.vm_network.problems))


async def vm_stats(
    request: requests.VmStats, channel: Channel, services: Services
) -> AgentResponse:
    statistics = await services.statistics.value()
    with failing_as(ErrorCode.STATUS_FAILED, "read what the VM uses"):
        return responses.Ok(await statistics.read())


async def diagnose(
    request: requests.Diagnose, channel: Channel, services: Services
) -> AgentResponse:
    diagnostics = await services.diagnostics.value()
    return responses.Ok(await diagnostics.diagnose())


async def shutdown(
    request: requests.Shutdown, channel: Channel, services: Services
) -> AgentResponse:
    await services.stop()
    # Power goes off after the answer is out, not before.
    channel.once_answered(services.stopped.set)
    return responses.Ok({"shutdown": True})


async def resumed(request: requests.Resumed, channel: Channel, services: Services) -> AgentResponse:
    if request.entropy is not None and len(request.entropy) > MOST_ENTROPY_BYTES:
        raise AgentError(
            ErrorCode.INVALID_REQUEST,
            f"entropy: {len(request.entropy)} bytes are more than the {MOST_ENTROPY_BYTES} "
            "allowed; 64 are plenty",
        )
    return responses.Ok(await services.resumer.resume(request.time_ns, request.entropy))
