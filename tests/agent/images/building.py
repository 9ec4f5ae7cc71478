"""Layers and images for tests, straight into the stores."""

import hashlib
from collections.abc import Callable

import orjson

from agent.images.atomic_file import publish
from agent.images.blob_store import UnpackedLayer
from agent.images.content_store import ContentStore, StoredImage, StoredLayer
from agent.images.layer import LayerStore
from agent.images.manifest import OCI_CONFIG, OCI_MANIFEST
from agent.images.reference import parse_reference
from tests.support.layout import LayerBlob, plain_layer

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
        built = build.finish()
        assert built.tar_bytes == len(tar)
    assert publish([built.files]) == [None]
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


def stored_image(
    store: ContentStore,
    layers: LayerStore,
    reference: str,
    *tars: bytes,
    pack: Callable[[bytes], LayerBlob] = plain_layer,
) -> StoredImage:
    """The same, in the store as a pull leaves it: documents, blobs, records, mounted layers."""
    descriptors = []
    for tar in tars:
        layer = pack(tar)
        if not layers.has(layer.diff_id):
            build(layers, tar)
        with store.blobs.open_partial(layer.digest) as partial:
            partial.append(layer.blob[partial.size :])
            unpacked = UnpackedLayer(layer.diff_id, len(tar))
            whole = store.blobs.whole_layer(layer.digest, unpacked, blob=partial.whole())
        assert store.blobs.add_layers([whole]) == [None]
        layers.mount(layer.digest, layer.diff_id)
        descriptors.append(
            {"mediaType": layer.media_type, "digest": layer.digest, "size": len(layer.blob)}
        )
    rootfs = {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]}
    config = orjson.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs})
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": OCI_CONFIG,
            "digest": store.blobs.add_document(config),
            "size": len(config),
        },
        "layers": descriptors,
    }
    digest = store.blobs.add_document(orjson.dumps(manifest))
    return store.tag(parse_reference(reference), digest, resolved=digest, platform="linux/amd64")
