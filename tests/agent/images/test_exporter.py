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
from agent.images.exporter import LayerExporter
from agent.images.garbage import GarbageCollector
from agent.images.layer import LayerStore
from agent.images.layer_tar import BLOCK_BYTES
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
def export(store: ContentStore, layers: LayerStore, claims: LayerClaims) -> Export:
    return Export(LayerExporter(store, layers, claims))


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


def tar_of(storage: Path, image: StoredImage, index: int) -> Path:
    """The file of a layer's tar."""
    return storage / "erofs" / f"{image.layers[index].diff_id.removeprefix('sha256:')}.tar"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def lengthen(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes() + bytes(length))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 700_000),
        lambda path: flip(path, 1024),
        lambda path: flip(path, -1),
        lambda path: flip(path, -30),
        lambda path: flip(path, -34),
        lambda path: cut(path, 700_000),
        lambda path: cut(path, 0),
        lambda path: lengthen(path, 1),
    ],
    ids=["middle", "early", "last byte", "footer", "table", "cut", "empty", "longer"],
)
async def test_a_damaged_tar_is_told_and_made_anew_by_the_next_pull(
    damage: Callable[[Path], None],
    export: Export,
    store: ContentStore,
    layers: LayerStore,
    storage: Path,
) -> None:
    image = stored_image(store, layers, "image", NOISE)
    (layer,) = image.layers
    damage(tar_of(storage, image, 0))
    error = await export.refusal(image.config_digest, 0)
    assert error.code is ErrorCode.EXPORT_FAILED
    assert error.message.startswith(
        f"export layer {layer.digest} of {image.reference}: the disk has damaged it: "
    )
    assert error.message.endswith("; pull the image again, which makes this layer anew")
    # What came before the damage is right.
    assert NOISE.startswith(b"".join(export.blocks))
    assert store.find(parse_reference("image")) == image
    # For a pull it is missing, until one has made it.
    assert not layers.has(layer.diff_id)
    stored_image(store, layers, "image", NOISE)
    assert layers.has(layer.diff_id)
    assert await export.of(image, 0) == NOISE


async def test_a_small_damaged_layer_gives_no_block_at_all(
    export: Export, store: ContentStore, layers: LayerStore, storage: Path
) -> None:
    image = stored_image(store, layers, "image", SMALL)
    flip(tar_of(storage, image, 0), 1200)
    await export.refusal(image.config_digest, 0)
    assert export.blocks == []


async def test_a_tar_that_cannot_be_read_is_an_error_with_the_cause(
    export: Export, store: ContentStore, layers: LayerStore, storage: Path
) -> None:
    image = stored_image(store, layers, "image", SMALL)
    tar_of(storage, image, 0).unlink()
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
    export: Export, store: ContentStore, layers: LayerStore, claims: LayerClaims, storage: Path
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
    assert not is_open(tar_of(storage, image, 0))


def is_open(path: Path) -> bool:
    """Whether this process has a file open."""
    return path in [link.resolve() for link in Path("/proc/self/fd").iterdir() if link.exists()]
