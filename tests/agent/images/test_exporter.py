"""Layers given away: the very tar that their diff_ids are of, or an error."""

import os
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio

from agent.errors import AgentError
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, StoredImage
from agent.images.exporter import BLOCK_BYTES, LayerExporter
from agent.images.garbage import GarbageCollector
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.reference import parse_reference
from protocol.constants import LAYER_CHUNK_SIZE
from protocol.errors import ErrorCode
from tests.agent.images.building import digest_of, stored_image
from tests.support.layout import LayerBlob, gzip_layer, plain_layer, zstd_layer
from tests.support.tarballs import entry, tarball

NOISE = tarball(entry("noise", os.urandom(1_300_000)), entry("zeros", bytes(1_500_000)))
SMALL = tarball(entry("small", b"x" * 5000))
PACKS = pytest.mark.parametrize("pack", [plain_layer, gzip_layer, zstd_layer])

Pack = Callable[[bytes], LayerBlob]


@attrs.define
class Export:
    """An exporter of a store, and what it gave away."""

    exporter: LayerExporter
    blocks: list[bytes] = attrs.field(factory=list)

    async def take(self, block: bytes) -> None:
        self.blocks.append(block)

    async def of(self, image: StoredImage, index: int) -> bytes:
        """The tar of a layer."""
        self.blocks.clear()
        await self.exporter.export(image.config_digest, index, self.take)
        return b"".join(self.blocks)

    async def refusal(self, digest: str, index: int) -> AgentError:
        self.blocks.clear()
        with pytest.raises(AgentError) as raised:
            await self.exporter.export(digest, index, self.take)
        return raised.value


@pytest.fixture
def store(storage: Path) -> ContentStore:
    return ContentStore(storage)


@pytest.fixture
def claims() -> LayerClaims:
    return LayerClaims()


@pytest.fixture
def export(store: ContentStore, claims: LayerClaims) -> Export:
    return Export(LayerExporter(store, claims))


@PACKS
async def test_it_is_the_tar_bit_for_bit_the_bottom_layer_first(
    pack: Pack, export: Export, store: ContentStore, layers: LayerStore
) -> None:
    image = stored_image(store, layers, "image", NOISE, SMALL, pack=pack)
    assert await export.of(image, 0) == NOISE
    assert all(0 < len(block) <= LAYER_CHUNK_SIZE for block in export.blocks)
    assert max(map(len, export.blocks)) >= BLOCK_BYTES
    assert digest_of(await export.of(image, 1)) == image.layers[1].diff_id


async def test_what_is_not_there_is_named(
    export: Export, store: ContentStore, layers: LayerStore
) -> None:
    image = stored_image(store, layers, "image", SMALL)
    for digest in ("sha256:" + "0" * 64, image.manifest_digest, "image", "", "../../etc/passwd"):
        error = await export.refusal(digest, 0)
        assert error.code is ErrorCode.NOT_FOUND
        assert error.message == f"image not found: none has the config digest {digest!r}"
    for index in (1, 2**64 - 1):
        error = await export.refusal(image.config_digest, index)
        assert error.code is ErrorCode.NOT_FOUND
        assert error.message == (
            f"layer not found: {image.reference} has 1 layers, counted from 0, and none with the "
            f"index {index}"
        )


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def lengthen(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes() + bytes(length))


@PACKS
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 700_000),
        lambda path: flip(path, -1),
        lambda path: flip(path, 0),
        lambda path: cut(path, 700_000),
        lambda path: cut(path, 0),
        lambda path: lengthen(path, 1),
    ],
    ids=["middle", "last byte", "first byte", "cut", "empty", "longer"],
)
async def test_a_damaged_blob_is_told_and_fetched_anew_by_the_next_pull(
    damage: Callable[[Path], None],
    pack: Pack,
    export: Export,
    store: ContentStore,
    layers: LayerStore,
) -> None:
    image = stored_image(store, layers, "image", NOISE, pack=pack)
    (layer,) = image.layers
    damage(store.blobs.path(layer.digest))
    error = await export.refusal(image.config_digest, 0)
    assert error.code is ErrorCode.EXPORT_FAILED
    assert error.message.startswith(
        f"export layer {layer.digest} of {image.reference}: the disk has damaged it: "
    )
    assert error.message.endswith("; pull the image again, which fetches this layer anew")
    # The image is what it was: its layer has been built from the right blob.
    assert store.find(parse_reference("image")) == image
    # For a pull it is missing, until one has brought it.
    assert not store.blobs.has(layer.digest, layer.blob_size)
    stored_image(store, layers, "image", NOISE, pack=pack)
    assert store.blobs.has(layer.digest, layer.blob_size)
    assert await export.of(image, 0) == NOISE


async def test_a_small_damaged_layer_gives_no_block_at_all(
    export: Export, store: ContentStore, layers: LayerStore
) -> None:
    image = stored_image(store, layers, "image", SMALL, pack=plain_layer)
    flip(store.blobs.path(image.layers[0].digest), 600)
    await export.refusal(image.config_digest, 0)
    assert export.blocks == []


async def test_a_blob_that_cannot_be_read_is_an_error_with_the_cause(
    export: Export, store: ContentStore, layers: LayerStore
) -> None:
    image = stored_image(store, layers, "image", SMALL)
    store.blobs.path(image.layers[0].digest).unlink()
    error = await export.refusal(image.config_digest, 0)
    assert error.code is ErrorCode.EXPORT_FAILED
    assert "No such file or directory" in error.message


async def test_no_collection_takes_a_layer_that_is_being_exported(
    export: Export, store: ContentStore, layers: LayerStore, claims: LayerClaims, storage: Path
) -> None:
    image = stored_image(store, layers, "image", NOISE, SMALL, pack=gzip_layer)
    collector = GarbageCollector(store, layers, Overlays(storage, layers, claims), claims)
    purges = []

    async def purge_and_take(block: bytes) -> None:
        if not export.blocks:
            purges.append(await collector.collect(purge_all=True))
        await export.take(block)

    await export.exporter.export(image.config_digest, 0, purge_and_take)
    assert b"".join(export.blocks) == NOISE
    assert set(purges[0].garbage.layers) == {image.layers[1].diff_id}
    assert (await export.refusal(image.config_digest, 0)).code is ErrorCode.NOT_FOUND
    await collector.collect()
    assert layers.sizes() == {}


async def test_an_export_that_is_cancelled_holds_nothing_any_more(
    export: Export, store: ContentStore, layers: LayerStore, claims: LayerClaims
) -> None:
    image = stored_image(store, layers, "image", NOISE)
    for blocks in range(2):
        export.blocks.clear()
        with trio.CancelScope() as scope:

            async def take(
                block: bytes, after: int = blocks, scope: trio.CancelScope = scope
            ) -> None:
                if len(export.blocks) == after:
                    scope.cancel()
                await export.take(block)
                await trio.lowlevel.checkpoint()

            await export.exporter.export(image.config_digest, 0, take)
        assert len(export.blocks) == blocks + 1
        async with claims.collecting() as claimed:
            assert claimed == frozenset()
    assert offsets_in(store.blobs.path(image.layers[0].digest)) == []


async def test_it_reads_no_further_ahead_than_one_block(
    export: Export, store: ContentStore, layers: LayerStore
) -> None:
    image = stored_image(store, layers, "image", tarball(entry("noise", os.urandom(16 << 20))))
    blob = store.blobs.path(image.layers[0].digest)
    positions = []

    async def look_and_take(block: bytes) -> None:
        given = sum(map(len, export.blocks))
        # The last blocks are sent when the file is closed already.
        found = await trio.to_thread.run_sync(offsets_in, blob)
        positions.extend(position - given for position in found)
        await export.take(block)

    await export.exporter.export(image.config_digest, 0, look_and_take)
    assert len(positions) > 10
    assert max(positions) <= 3 * BLOCK_BYTES


def offsets_in(path: Path) -> list[int]:
    """Where this process is in a file that it has open, see proc_pid_fdinfo(5)."""
    return [
        int(Path(f"/proc/self/fdinfo/{link.name}").read_text().split()[1])
        for link in Path("/proc/self/fd").iterdir()
        if link.exists() and link.resolve() == path
    ]
