"""From a reference to the blobs that make up one platform's image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from agent.images.blob_store import BlobStore, digest_of
from agent.images.content_store import Tag
from agent.images.image_config import ImageConfig, parse_config
from agent.images.manifest import (
    DOCKER_MANIFEST,
    Descriptor,
    ImageIndex,
    ImageManifest,
    InvalidManifest,
    as_oci,
    parse_manifest,
)
from agent.images.persistence import Persistence
from agent.images.platform import NoSuchPlatform, Platform, choose
from agent.images.reference import Reference
from protocol.retry import RetryPolicy

if TYPE_CHECKING:
    from agent.images.mirrored_registry import MirroredRegistry


@attrs.frozen
class WantedLayer:
    """A layer that an image needs: its blob, and the digest of the tar inside."""

    digest: str
    size: int
    media_type: str
    diff_id: str


@attrs.frozen
class ResolvedImage:
    """What a reference stands for now: everything about an image but its layers' contents.

    ``resolved`` is the digest of the manifest or index that the reference names, and
    ``documents`` are the manifest and the config, still to be stored; ``layers`` are bottom
    first. ``digests`` are those of everything that the store is to have of it, diff_ids included.
    """

    resolved: str
    manifest_digest: str
    config_digest: str
    layers: tuple[WantedLayer, ...]
    documents: tuple[bytes, ...]
    digests: frozenset[str]

    @classmethod
    def of(cls, tag: Tag) -> ResolvedImage:
        """An image of the store, once more."""
        layers = tuple(
            WantedLayer(layer.digest, layer.blob_size, layer.media_type, layer.diff_id)
            for layer in tag.image.layers
        )
        return cls(
            tag.entry.resolved,
            tag.entry.manifest_digest,
            tag.image.config_digest,
            layers,
            (),
            tag.digests,
        )


@attrs.frozen
class Question:
    """What a pull is after: the image of a reference for a platform.

    With ``insist`` an image that is not in an index has to be for that platform too; else it is
    taken as it is, as docker does.
    """

    reference: Reference
    platform: Platform
    insist: bool

    def ask(
        self, client: MirroredRegistry, blobs: BlobStore, known: Tag | None, policy: RetryPolicy
    ) -> ResolvedImage:
        """What the registry says to it; in a worker thread.

        Where the tag has not moved since `known`, that is one small request. Documents that are
        in `blobs` are not fetched.

        Raises:
            RegistryError: the registry did not give them.
            InvalidManifest, NoSuchPlatform: it gave something that cannot be used.
        """
        target = self.reference.target
        if known is not None:
            # Registries do not count these against a pull limit.
            digest = Persistence(policy).call(lambda: client.head_manifest(target))
            if digest == known.entry.resolved:
                return ResolvedImage.of(known)

        data, content_type = Persistence(policy).call(lambda: client.get_manifest(target))
        resolved = digest_of(data)
        document = parse_manifest(data, content_type)
        in_index = isinstance(document, ImageIndex)
        if isinstance(document, ImageIndex):
            offered = [entry.platform for entry in document.manifests]
            chosen = document.manifests[choose(offered, self.platform)]
            data = _manifest(client, blobs, chosen, policy)
            document = parse_manifest(data, chosen.media_type)
        if not isinstance(document, ImageManifest):
            raise InvalidManifest("an index within an index")

        config_data = _config(client, blobs, document.config, policy)
        config = ImageConfig.of(parse_config(config_data))
        if self.insist and not in_index and not self._fits(config.platform):
            raise NoSuchPlatform(f"the image is for {config.platform}, not {self.platform}")
        if len(config.diff_ids) != len(document.layers):
            raise InvalidManifest(
                f"the config has {len(config.diff_ids)} diff_ids for the manifest's "
                f"{len(document.layers)} layers"
            )
        layers = tuple(
            WantedLayer(layer.digest, layer.size, layer.media_type, diff_id)
            for layer, diff_id in zip(document.layers, config.diff_ids, strict=True)
        )
        to_be_stored = {digest_of(data), digest_of(config_data)}
        if document.media_type == DOCKER_MANIFEST:
            to_be_stored.add(digest_of(as_oci(data)))
        digests = to_be_stored.union(*((layer.digest, layer.diff_id) for layer in layers))
        return ResolvedImage(
            resolved,
            digest_of(data),
            document.config.digest,
            layers,
            (data, config_data),
            frozenset(digests),
        )

    def _fits(self, own: Platform | None) -> bool:
        try:
            choose([own], self.platform)
        except NoSuchPlatform:
            return False
        return True


def _manifest(
    client: MirroredRegistry, blobs: BlobStore, chosen: Descriptor, policy: RetryPolicy
) -> bytes:
    data = blobs.read_document(chosen.digest)
    if data is None:
        data, _ = Persistence(policy).call(lambda: client.get_manifest(chosen.digest))
    if len(data) != chosen.size:
        raise InvalidManifest(
            f"manifest {chosen.digest} has {len(data)} bytes, the index says {chosen.size}"
        )
    return data


def _config(
    client: MirroredRegistry, blobs: BlobStore, descriptor: Descriptor, policy: RetryPolicy
) -> bytes:
    data = blobs.read_document(descriptor.digest)
    if data is None:
        data = Persistence(policy).call(lambda: client.get_document(descriptor))
    return data
