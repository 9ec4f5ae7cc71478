"""A storage with images and overlays in it, and what a collection may take of it."""

from pathlib import Path

import attrs

from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, StoredImage
from agent.images.garbage import Collection, GarbageCollector
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from tests.agent.images.building import stored_image
from tests.support.layout import gzip_layer, plain_layer
from tests.support.tarballs import directory, entry, tarball


def tar_of(name: str) -> bytes:
    """A layer of its own, with a file of that name."""
    return tarball(directory("etc/"), entry(f"etc/{name}", name.encode() * 1000))


@attrs.frozen
class WholeStorage:
    """A whole storage, with what collects garbage in it."""

    path: Path
    store: ContentStore
    layers: LayerStore
    overlays: Overlays
    claims: LayerClaims

    @property
    def garbage(self) -> GarbageCollector:
        return GarbageCollector(self.store, self.layers, self.overlays, self.claims)

    async def collect(self, **how: bool) -> Collection:
        return await self.garbage.collect(**how)

    def image(self, reference: str, *names: str, gzipped: bool = False) -> StoredImage:
        tars, pack = map(tar_of, names), gzip_layer if gzipped else plain_layer
        return stored_image(self.store, self.layers, reference, *tars, pack=pack)

    def files(self) -> set[str]:
        """Everything that a collection may take: blobs, records, partials, layers, mounts."""
        places = ("oci/blobs/sha256", "oci/unpacked", "oci/ingest", "erofs", "layers")
        return {
            f"{place}/{path.name}" for place in places for path in (self.path / place).iterdir()
        }

    def read(self, image: StoredImage) -> list[str]:
        """The files in the layers of an image, each read where it is mounted."""
        found = []
        for layer in image.layers:
            for path in (self.layers.directory(layer.digest) / "etc").iterdir():
                assert path.read_bytes() == path.name.encode() * 1000
                found.append(path.name)
        return found

    def bytes_of(self, files: set[str]) -> int:
        return sum(
            (self.path / file).stat().st_size for file in files if not file.startswith("layers/")
        )
