"""Requests about images: fetch one, find one, list them, remove what none of them needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs

from agent.channel import Channel
from agent.errors import AgentError
from agent.images.content_store import StoredImage
from agent.images.overlay_record import OverlayRecord
from agent.images.packed_image import DIGEST_OF_PACKED, PackedImage
from agent.images.platform import InvalidPlatform, parse_platform
from agent.images.progress import PullProgress
from agent.images.reference import InvalidReference, Reference, parse_reference
from agent.services import Services
from protocol import AgentResponse, requests, responses
from protocol.errors import ErrorCode
from protocol.values import CollectedGarbage


async def pull(request: requests.Pull, channel: Channel, services: Services) -> AgentResponse:
    if (packed := await packed_image(services, ErrorCode.PULL_FAILED)) is not None:
        if request.dry_run:
            return responses.Ok(await packed.plan(request.image, ErrorCode.PULL_FAILED))
        image = await packed.image(request.image, ErrorCode.PULL_FAILED)
        return responses.Ok(image.info())
    reference = parse(request.image, ErrorCode.PULL_FAILED)
    try:
        platform = parse_platform(request.oci_platform) if request.oci_platform else None
    except InvalidPlatform as error:
        raise AgentError(ErrorCode.PULL_FAILED, f"pull {reference}: {error}") from error
    images = await services.images.passed(ErrorCode.PULL_FAILED)
    # A network that is not to be had is met like a registry out of reach: an image of the store
    # needs none.
    await services.network.decided()

    async def tell(progress: PullProgress) -> None:
        await channel.send(responses.Progress(**attrs.asdict(progress)))

    how = {"proxy": request.proxy, "no_proxy": request.no_proxy}
    puller = images.puller
    try:
        if request.dry_run:
            plan = await puller.plan(reference, platform, request.auth, tell, **how)
            return responses.Ok(plan)
        image = await puller.pull(reference, platform, request.auth, tell, **how)
    except AgentError as error:
        if services.network.failure is None:
            raise
        why = f"{error.message} ({services.network.failure.message})"
        raise AgentError(error.code, why) from error
    return responses.Ok(image.info())


async def query(request: requests.Query, channel: Channel, services: Services) -> AgentResponse:
    image = await stored_image(request.image, services, ErrorCode.QUERY_FAILED)
    if services.config.packed_layers is not None:
        # There is no end to the names that it may be asked for by.
        return responses.Ok(image.info())
    return responses.Ok(services.images.value.answers.of(image))


async def list_images(
    request: requests.ListImages, channel: Channel, services: Services
) -> AgentResponse:
    images = await services.images.passed(ErrorCode.LIST_FAILED)
    if images.packed is not None:
        image = await images.packed.image(DIGEST_OF_PACKED, ErrorCode.LIST_FAILED)
        return responses.Ok([image.info()])
    return responses.Ok(images.answers.of_all())


async def garbage_collect(
    request: requests.GarbageCollect, channel: Channel, services: Services
) -> AgentResponse:
    images = await services.images.passed(ErrorCode.GC_FAILED)
    collection = await images.garbage.collect(dry_run=request.dry_run, purge_all=request.purge_all)
    garbage = collection.garbage
    if not request.dry_run:
        services.trim_after(garbage.total_bytes)
    return responses.Ok(
        CollectedGarbage(
            dry_run=request.dry_run,
            freed_bytes=garbage.total_bytes,
            images=collection.images,
            layers=tuple(sorted(garbage.layers)),
            blobs=tuple(sorted(garbage.blobs)),
            partial_blobs=tuple(sorted(garbage.partials)),
        )
    )


async def export_layer(
    request: requests.ExportLayer, channel: Channel, services: Services
) -> AgentResponse:
    images = await services.images.passed(ErrorCode.EXPORT_FAILED)
    if images.packed is not None and request.image_digest == DIGEST_OF_PACKED:
        await images.packed.image(DIGEST_OF_PACKED, ErrorCode.EXPORT_FAILED)

    async def send(block: bytes) -> None:
        await channel.send(responses.DataChunk(block, done=False))

    await images.exporter.export(request.image_digest, request.layer_index, send)
    return responses.DataChunk(b"", done=True)


async def flatten_layers(
    request: requests.FlattenLayers, channel: Channel, services: Services
) -> AgentResponse:
    images = await services.images.passed(ErrorCode.OVERLAY_FAILED)
    await images.flattener.flatten(request.lowerdirs, request.output)
    return responses.Ok()


def parse(image: str, code: ErrorCode) -> Reference:
    """The reference that ``image`` spells.

    Raises:
        AgentError: ``code``, for one that docker would not take either.
    """
    try:
        return parse_reference(image)
    except InvalidReference as error:
        raise AgentError(code, str(error)) from error


async def packed_image(services: Services, code: ErrorCode) -> PackedImage | None:
    """What all references mean, where there is a share of packed layers.

    Raises:
        AgentError: ``code``, for storage that is not up.
    """
    if services.config.packed_layers is None:
        return None
    return (await services.images.passed(code)).packed


async def stored_image(image: str, services: Services, code: ErrorCode) -> StoredImage:
    """The image of any spelling of its reference, from the store alone; or the share's, of any.

    Raises:
        AgentError: NOT_FOUND, or ``code`` for a bad reference and for storage that is not up.
    """
    if (packed := await packed_image(services, code)) is not None:
        return await packed.image(image, ErrorCode.NOT_FOUND)
    reference = parse(image, code)
    images = await services.images.passed(code)
    found = images.store.find(reference)
    if found is None:
        raise AgentError(ErrorCode.NOT_FOUND, f"image not found: {image}; pull {reference} first")
    return found


@asynccontextmanager
async def image_in_use(
    image: str, services: Services, code: ErrorCode
) -> AsyncIterator[StoredImage]:
    """The same, whose layers no collection takes away until the block is left."""
    if services.config.packed_layers is not None:
        # No collection takes that one.
        yield await stored_image(image, services, code)
        return
    while True:
        found = await stored_image(image, services, code)
        async with services.images.value.claims.held(OverlayRecord.of(found).digests):
            # One that was under way may have taken it away just before.
            if await stored_image(image, services, code) is found:
                yield found
                return
