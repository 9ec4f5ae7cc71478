"""Layers on their way out: the tar inside a layer's blob, block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import closing

import attrs
import trio

from agent.errors import AgentError, failing_as
from agent.images.blob_store import BlobStore
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, StoredImage, StoredLayer
from agent.images.decompression import Decompression, DecompressionError
from protocol.errors import ErrorCode

# What is sent at once. Larger frames (LAYER_CHUNK_SIZE would be allowed) take more memory and hold
# up everybody else for longer, and are no faster.
BLOCK_BYTES = 1 << 20

_READ_BYTES = 256 << 10
# Each holds one only while it makes a block, and none while its host is slow to read.
_THREADS = 4

OnBlock = Callable[[bytes], Awaitable[None]]


class DamagedLayer(Exception):
    """What is stored is not the layer; the text says what it is."""


@attrs.frozen
class LayerExporter:
    """Gives away the tars of the layers of ``store``; for any number of hosts at once."""

    store: ContentStore
    claims: LayerClaims
    _limiter: trio.CapacityLimiter = attrs.field(
        factory=lambda: trio.CapacityLimiter(_THREADS), init=False
    )

    async def export(self, config_digest: str, layer_index: int, on_block: OnBlock) -> None:
        """Await ``on_block`` with one block after the other of the tar whose digest is the diff_id,
        about BLOCK_BYTES each; while one is sent, the next is made.

        Index 0 is the bottom layer. Returns when all was given and the blob's digest is right.

        Raises:
            AgentError: NOT_FOUND, or EXPORT_FAILED, perhaps after some blocks: then they are not to
                be believed.
        """
        image = self._find(config_digest, layer_index)
        layer = image.layers[layer_index]
        async with self.claims.held({layer.digest, layer.diff_id}):
            # A collection that was under way may have taken it.
            image = self._find(config_digest, layer_index)
            failures: list[AgentError] = []
            with closing(_blocks(self.store.blobs, layer)) as blocks:
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
            except (DamagedLayer, DecompressionError) as error:
                self.store.blobs.distrust(layer.digest)
                failures.append(
                    AgentError(
                        ErrorCode.EXPORT_FAILED,
                        f"{doing}: the disk has damaged it: {error}; pull the image again, "
                        "which fetches this layer anew",
                    )
                )
            except AgentError as error:
                failures.append(error)

    def _find(self, config_digest: str, layer_index: int) -> StoredImage:
        image = self.store.by_config_digest(config_digest)
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


def _blocks(blobs: BlobStore, layer: StoredLayer) -> Generator[bytes, None, None]:
    """The tar in blocks of BLOCK_BYTES or a little more, the last one of what is left. Blocks.

    Raises:
        DamagedLayer, DecompressionError: the blob is not what was stored, as seen at last when all
            of it was read.
        OSError: it cannot be read.
    """
    gathered: list[bytes | memoryview] = []
    gathered_bytes = total_bytes = 0
    for chunk in _chunks(blobs, layer):
        gathered.append(chunk)
        gathered_bytes += len(chunk)
        total_bytes += len(chunk)
        if gathered_bytes >= BLOCK_BYTES:
            yield b"".join(gathered)
            gathered, gathered_bytes = [], 0
    if total_bytes != layer.size:
        raise DamagedLayer(f"it holds {total_bytes} bytes instead of {layer.size}")
    if gathered:
        yield b"".join(gathered)


def _chunks(blobs: BlobStore, layer: StoredLayer) -> Iterator[bytes | memoryview]:
    decompression = Decompression(layer.media_type)
    sha256 = hashlib.sha256()
    with blobs.path(layer.digest).open("rb", buffering=0) as blob:
        while data := blob.read(_READ_BYTES):
            sha256.update(data)
            yield from decompression.feed(data)
        yield from decompression.finish()
    digest = f"sha256:{sha256.hexdigest()}"
    if digest != layer.digest:
        raise DamagedLayer(f"its digest is {digest}")
