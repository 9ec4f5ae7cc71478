"""What a pull would fetch, before it does."""

from __future__ import annotations

from agent.images.blob_store import BlobStore
from agent.images.layer import LayerStore
from agent.images.resolution import ResolvedImage, WantedLayer
from protocol.values import PlannedLayer, PullPlan

# Of gzip or zstd to a file system: images are mostly programs and text. Only unpacking tells.
_USUAL_RATIO = 3


def plan_pull(
    image: ResolvedImage, reference: str, platform: str, blobs: BlobStore, layers: LayerStore
) -> PullPlan:
    """What a pull of a resolved image would do now. Blocking; raises OSError."""
    planned, unpacked_bytes = [], 0
    for layer in dict.fromkeys(image.layers):
        fetch_bytes = 0
        if not blobs.has(layer.digest, layer.size):
            fetch_bytes = layer.size - min(blobs.partial_bytes(layer.digest), layer.size)
        if not layers.has(layer.diff_id):
            unpacked_bytes += _unpacked_bytes(layer, blobs)
        planned.append(PlannedLayer(layer.digest, layer.size, fetch_bytes))
    fetch_bytes = sum(layer.fetch_bytes for layer in planned)
    return PullPlan(
        reference=reference,
        digest=image.config_digest,
        platform=platform,
        layers=tuple(planned),
        fetch_bytes=fetch_bytes,
        disk_bytes=fetch_bytes + unpacked_bytes,
        free_bytes=blobs.free_bytes(),
    )


def _unpacked_bytes(layer: WantedLayer, blobs: BlobStore) -> int:
    known = blobs.unpacked(layer.digest)
    if known is not None:
        return known.size
    return layer.size * (1 if layer.media_type.endswith(".tar") else _USUAL_RATIO)
