"""OCI image layouts written by hand: every byte, digest and media type as a test wants it.

https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from tests.support.commands import run

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"

Descriptor = dict[str, Any]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@frozen
class LayerBlob:
    """A layer as it travels, and the digest of the tar inside."""

    media_type: str
    blob: bytes = field(repr=False)
    diff_id: str

    @property
    def digest(self) -> str:
        return digest_of(self.blob)


def gzip_layer(tar: bytes) -> LayerBlob:
    # No time in the header: the same tar is the same blob.
    return LayerBlob(LAYER + "+gzip", gzip.compress(tar, 6, mtime=0), digest_of(tar))


def zstd_layer(tar: bytes) -> LayerBlob:
    return LayerBlob(LAYER + "+zstd", run("zstd", "--quiet", "-c", stdin=tar), digest_of(tar))


def plain_layer(tar: bytes) -> LayerBlob:
    return LayerBlob(LAYER, tar, digest_of(tar))


class Layout:
    """An OCI image layout in a new directory; blobs and tags are only ever added."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tags: dict[str, Descriptor] = {}
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))

    def blob_path(self, digest: str) -> Path:
        return self.directory / "blobs/sha256" / digest.removeprefix("sha256:")

    def read_json(self, digest: str) -> Any:
        return json.loads(self.blob_path(digest).read_bytes())

    def add_blob(self, data: bytes, media_type: str) -> Descriptor:
        digest = digest_of(data)
        self.blob_path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_manifest(
        self,
        layers: Sequence[LayerBlob],
        config: Mapping[str, object],
        *,
        architecture: str = "amd64",
        os: str = "linux",
        variant: str | None = None,
        more_diff_ids: Sequence[str] = (),
    ) -> Descriptor:
        """An image whose config document holds `config` under its `config` key.

        `more_diff_ids` are of layers that the manifest does not have.
        """
        diff_ids = [*(layer.diff_id for layer in layers), *more_diff_ids]
        document: dict[str, object] = {
            "created": "2024-02-29T12:00:00Z",
            "architecture": architecture,
            "os": os,
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": f"layer {n}"} for n in range(len(layers))],
        }
        platform = {"architecture": architecture, "os": os}
        if variant is not None:
            document["variant"] = platform["variant"] = variant
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.add_blob(_json(document), CONFIG),
            "layers": [self.add_blob(layer.blob, layer.media_type) for layer in layers],
        }
        return self.add_blob(_json(manifest), MANIFEST) | {"platform": platform}

    def add_index(self, manifests: Sequence[Descriptor]) -> Descriptor:
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}
        return self.add_blob(_json(index), INDEX)

    def tag(self, name: str, descriptor: Descriptor) -> None:
        self._tags[name] = descriptor | {
            "annotations": {"org.opencontainers.image.ref.name": name},
        }
        index = {"schemaVersion": 2, "manifests": list(self._tags.values())}
        (self.directory / "index.json").write_bytes(_json(index))


def _json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
