"""Layers and images for tests, straight into the stores."""

import hashlib

from agent.images.content_store import StoredImage, StoredLayer
from agent.images.layer import LayerStore

PLAIN = "application/vnd.oci.image.layer.v1.tar"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def build(
    layers: LayerStore,
    tar: bytes,
    blob: bytes | None = None,
    media_type: str = PLAIN,
    diff_id: str | None = None,
) -> str:
    """Build a layer from a tar, or from a blob that should hold it; its diff_id."""
    diff_id = diff_id or digest_of(tar)
    with layers.building(diff_id, media_type) as build:
        data = tar if blob is None else blob
        for start in range(0, len(data), 1 << 20):
            build.write(data[start : start + (1 << 20)])
        assert build.finish() == len(tar)
    return diff_id


def image_of(layers: LayerStore, *tars: bytes, reference: str = "test/image:latest") -> StoredImage:
    """An image of these layers, bottom first; blobs are their tars."""
    stored = []
    for tar in tars:
        diff_id = digest_of(tar)
        if not layers.has(diff_id):
            build(layers, tar)
        stored.append(StoredLayer(diff_id, diff_id, len(tar), PLAIN, len(tar)))
    config_digest = digest_of(repr(stored).encode())
    return StoredImage(reference, digest_of(b"manifest"), config_digest, tuple(stored), {})
