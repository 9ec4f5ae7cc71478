"""The images that the VM has, as a standard OCI image layout in `storage/oci/`.

https://github.com/opencontainers/image-spec/blob/main/image-layout.md

    oci-layout      the layout's version
    index.json      one descriptor a reference (`layout_index.py`); its name is the canonical
                    reference: skopeo inspect oci:/storage/oci:docker.io/library/alpine:latest
    blobs/ and what is kept beside them: `blob_store.py`

Tools that read a layout know only OCI's media types, so an image that came with a schema 2
manifest has a copy of it in those types, and index.json points to the copy; the manifest itself
and its config stay byte for byte.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path

import attrs

from agent.images.blob_store import BlobStore
from agent.images.image_config import ImageConfig, parse_config
from agent.images.layout_index import IndexEntry, InvalidIndex, parse_index, render_index
from agent.images.manifest import (
    DOCKER_MANIFEST,
    OCI_MANIFEST,
    ImageManifest,
    InvalidManifest,
    as_oci,
    parse_manifest,
)
from agent.images.reference import Reference, parse_reference
from protocol.values import ImageInfo

log = logging.getLogger(__name__)


@attrs.frozen
class StoredLayer:
    """A layer: ``digest`` of its blob, ``diff_id`` and ``size`` (bytes) of the tar inside."""

    digest: str
    diff_id: str
    size: int
    media_type: str
    blob_size: int


@attrs.frozen
class StoredImage:
    """An image that is whole: all its blobs are in the store and verified.

    ``reference`` is canonical, ``layers`` are bottom first, ``config`` is the OCI image config
    document, of which `ImageConfig.of` can be made.
    """

    reference: str
    manifest_digest: str
    config_digest: str
    layers: tuple[StoredLayer, ...]
    config: Mapping[str, object] = attrs.field(repr=False)

    def info(self) -> ImageInfo:
        """The image as hosts are told of it."""
        config = ImageConfig.of(self.config)
        return ImageInfo(
            reference=self.reference,
            digest=self.config_digest,
            size=sum(layer.size for layer in self.layers),
            created=config.created,
            architecture=config.architecture,
            os=config.os,
            layer_count=len(self.layers),
            layers=tuple(layer.digest for layer in self.layers),
            entrypoint=config.entrypoint,
            cmd=config.cmd,
            env=config.env,
            workdir=config.workdir,
            user=config.user,
        )


@attrs.frozen
class Tag:
    """What a reference stands for: an image, and (`IndexEntry`) how it came to that."""

    image: StoredImage
    entry: IndexEntry

    @property
    def documents(self) -> frozenset[str]:
        """The digests of its manifest, of that in OCI's media types, and of its config."""
        entry = self.entry
        return frozenset({entry.digest, entry.manifest_digest, self.image.config_digest})

    @property
    def digests(self) -> frozenset[str]:
        """The digests of everything that it needs: documents, layers' blobs, and diff_ids."""
        layers = self.image.layers
        return self.documents.union(*((layer.digest, layer.diff_id) for layer in layers))


class NotWhole(Exception):
    """A part of an image is missing or damaged; the text names the image and the part."""


class ContentStore:
    """The images in `storage_dir`/oci, which is made if there is none.

    This process is the store's only writer. Construction, ``tag`` and ``forget`` use the disk and
    raise OSError; everything else answers from memory. Any thread may call any method.
    """

    def __init__(self, storage_dir: Path) -> None:
        directory = storage_dir / "oci"
        self.blobs = BlobStore(directory)
        self._index_path = directory / "index.json"
        self._lock = threading.Lock()
        layout = directory / "oci-layout"
        if not layout.exists():
            self.blobs.write(layout, b'{"imageLayoutVersion":"1.0.0"}')
        if not self._index_path.exists():
            self.blobs.write(self._index_path, render_index(()))
        self._tags: Mapping[str, Tag] = {}
        self._by_digest: Mapping[tuple[str, str], Tag] = {}
        self._in_order: tuple[Tag, ...] = ()
        self._know(self._load())

    def find(self, reference: Reference) -> StoredImage | None:
        """The image that a reference names, also where it was pulled by another spelling."""
        tag = self.find_tag(reference)
        return tag.image if tag else None

    def find_tag(self, reference: Reference) -> Tag | None:
        """As ``find``, with what is known of how the reference was resolved."""
        tag = self._tags.get(str(reference))
        if tag is not None or reference.digest is None:
            return tag
        # The digest alone says which image it is, whatever the tag beside it.
        return self._by_digest.get((reference.name, reference.digest))

    def by_config_digest(self, digest: str) -> StoredImage | None:
        """The image whose `ImageInfo.digest` is `digest`."""
        return next((image for image in self.images() if image.config_digest == digest), None)

    def images(self) -> list[StoredImage]:
        """One image for each reference, in the order in which they were first pulled."""
        return [tag.image for tag in self._in_order]

    def tags(self) -> tuple[Tag, ...]:
        """All that references stand for, in the same order; the same object until that changes."""
        return self._in_order

    def tag(
        self, reference: Reference, manifest_digest: str, *, resolved: str, platform: str
    ) -> StoredImage:
        """Let a reference name an image, all of whose parts are in the store by now.

        Raises:
            NotWhole: they are not; nothing has changed.
        """
        data = self._document(manifest_digest)
        digest = manifest_digest
        manifest = parse_manifest(data, OCI_MANIFEST)
        if isinstance(manifest, ImageManifest) and manifest.media_type == DOCKER_MANIFEST:
            data = as_oci(data)
            digest = self.blobs.add_document(data)
        entry = IndexEntry(str(reference), digest, len(data), manifest_digest, resolved, platform)
        image = self._load_image(entry)
        with self._lock:
            self._keep({**self._tags, entry.reference: Tag(image, entry)})
        return image

    def forget(self, references: Collection[str]) -> None:
        """Let these references, canonical, name nothing any more; their blobs stay."""
        with self._lock:
            tags = self._tags.items()
            self._keep({name: tag for name, tag in tags if name not in references})

    def _keep(self, tags: Mapping[str, Tag]) -> None:
        self.blobs.write(self._index_path, render_index(tag.entry for tag in tags.values()))
        self._know(tags)

    def _know(self, tags: Mapping[str, Tag]) -> None:
        # Replaced, not changed: readers in other threads have the one or the other.
        by_digest: dict[tuple[str, str], Tag] = {}
        for name, tag in tags.items():
            for digest in (tag.entry.resolved, tag.entry.manifest_digest):
                by_digest.setdefault((parse_reference(name).name, digest), tag)
        self._tags, self._by_digest, self._in_order = tags, by_digest, tuple(tags.values())

    def _load(self) -> dict[str, Tag]:
        """The whole images of index.json; what is wrong with others is logged."""
        tags = {}
        try:
            descriptors = parse_index(self._index_path.read_bytes())
        except InvalidIndex as error:
            log.error("%s is damaged, so no image is known: %s", self._index_path, error)
            return {}
        for descriptor in descriptors:
            try:
                entry = IndexEntry.of(descriptor)
                tags[entry.reference] = Tag(self._load_image(entry), entry)
            except (InvalidIndex, NotWhole) as error:
                log.warning("an image is left out: %s", error)
        return tags

    def _load_image(self, entry: IndexEntry) -> StoredImage:
        """The image of an entry, of documents that are verified and layers that are there."""
        try:
            parse_reference(entry.reference)
            manifest = parse_manifest(self._document(entry.digest), OCI_MANIFEST)
            if not isinstance(manifest, ImageManifest):
                raise NotWhole(f"{entry.digest} is an index")
            config = parse_config(self._document(manifest.config.digest))
            diff_ids = ImageConfig.of(config).diff_ids
            layers = []
            for layer, diff_id in zip(manifest.layers, diff_ids, strict=True):
                unpacked = self.blobs.unpacked(layer.digest)
                if not self.blobs.has(layer.digest, layer.size):
                    raise NotWhole(f"layer {layer.digest} is missing")
                if unpacked is None or unpacked.diff_id != diff_id:
                    raise NotWhole(f"layer {layer.digest} is not known to be {diff_id}")
                layers.append(
                    StoredLayer(layer.digest, diff_id, unpacked.size, layer.media_type, layer.size)
                )
        except (NotWhole, InvalidManifest, ValueError) as error:
            raise NotWhole(f"{entry.reference}: {error}") from error
        return StoredImage(
            reference=entry.reference,
            manifest_digest=entry.manifest_digest,
            config_digest=manifest.config.digest,
            layers=tuple(layers),
            config=config,
        )

    def _document(self, digest: str) -> bytes:
        data = self.blobs.read_document(digest)
        if data is None:
            raise NotWhole(f"{digest} is missing or damaged")
        return data
