"""Layers on their way out: their tars, block by block."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import closing

import attrs
import trio

from agent.errors import AgentError, failing_as
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, StoredImage, StoredLayer
from agent.images.layer import LayerStore
from agent.images.layer_tar import DamagedTar
from agent.images.packed_image import PackedImage
from agent.images.packed_share import unpacked_id
from protocol.errors import ErrorCode

# Each holds one only while it reads a block, and none while its host is slow to read.
_THREADS = 4

OnBlock = Callable[[bytes], Awaitable[None]]


@attrs.frozen
class LayerExporter:
    """Gives away the tars of ``layers``, those of the images in ``store``; for any number of hosts
    at once.
    """

    store: ContentStore
    layers: LayerStore
    claims: LayerClaims
    packed: PackedImage | None = None
    _limiter: trio.CapacityLimiter = attrs.field(
        factory=lambda: trio.CapacityLimiter(_THREADS), init=False
    )

    async def export(self, config_digest: str, layer_index: int, on_block: OnBlock) -> None:
        """Await ``on_block`` with one block after the other of the tar whose digest is the diff_id,
        a MiB each; while one is sent, the next is read.

        Larger ones (LAYER_CHUNK_SIZE would be allowed) take more memory and hold up everybody else
        for longer, and are no faster. Index 0 is the bottom layer.

        Raises:
            AgentError: NOT_FOUND, or EXPORT_FAILED, perhaps after some blocks, which are right.
        """
        image = self._find(config_digest, layer_index)
        layer = image.layers[layer_index]
        if (directory := unpacked_id(layer.digest, layer.diff_id)) is not None:
            raise AgentError(
                ErrorCode.EXPORT_FAILED,
                f"export layer {layer.digest}: the share of packed layers has it as the directory "
                f"{directory!r}, and not as a tar; the host has it already",
            )
        async with self.claims.held({layer.digest, layer.diff_id}):
            # A collection that was under way may have taken it.
            image = self._find(config_digest, layer_index)
            failures: list[AgentError] = []
            with closing(_blocks(self.layers, layer)) as blocks:
                # Errors do not end the nursery: that would cut off a block that is being sent.
                async with trio.open_nursery() as nursery:
                    ready, take = trio.open_memory_channel[bytes](0)
                    nursery.start_soon(self._read, blocks, ready, image, layer, failures)
                    async with take:
                        async for block in take:
                            await on_block(block)
            if failures:
                raise failures[0]

    async def _read(
        self,
        blocks: Iterator[bytes],
        ready: trio.MemorySendChannel[bytes],
        image: StoredImage,
        layer: StoredLayer,
        failures: list[AgentError],
    ) -> None:
        doing = f"export layer {layer.digest} of {image.reference}"
        async with ready:
            try:
                with failing_as(ErrorCode.EXPORT_FAILED, doing):
                    while block := await trio.to_thread.run_sync(
                        next, blocks, b"", limiter=self._limiter
                    ):
                        await ready.send(block)
            except DamagedTar as error:
                failures.append(
                    AgentError(
                        ErrorCode.EXPORT_FAILED,
                        f"{doing}: the disk has damaged it: {error}; pull the image again, "
                        "which makes this layer anew",
                    )
                )
            except AgentError as error:
                failures.append(error)

    def _find(self, config_digest: str, layer_index: int) -> StoredImage:
        image = self.store.by_config_digest(config_digest)
        if image is None and self.packed is not None:
            image = self.packed.by_config_digest(config_digest)
        if image is None:
            raise AgentError(
                ErrorCode.NOT_FOUND,
                f"image not found: none has the config digest {config_digest[:100]!r}",
            )
        if layer_index >= len(image.layers):
            raise AgentError(
                ErrorCode.NOT_FOUND,
                f"layer not found: {image.reference} has {len(image.layers)} layers, counted from "
                f"0, and none with the index {layer_index}",
            )
        return image


def _blocks(layers: LayerStore, layer: StoredLayer) -> Generator[bytes, None, None]:
    with layers.tar(layer.diff_id) as tar:
        yield from tar.blocks()
