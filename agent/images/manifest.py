"""Manifests and indexes: bytes from a registry, checked and taken apart.

https://github.com/opencontainers/image-spec: descriptor.md, manifest.md, image-index.md;
docker's schema 2 has the same shape under other media types,
https://github.com/distribution/distribution/blob/main/docs/content/spec/manifest-v2-2.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import attrs
import orjson

from agent.images.platform import Platform, normalize

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

ACCEPTED_MANIFESTS = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX)

# What containerd and distribution take as a manifest, and a generous config.
LARGEST_MANIFEST = 4 << 20
LARGEST_CONFIG = 8 << 20
# OVL_MAX_STACK in the kernel's fs/overlayfs/params.h.
MOST_LAYERS = 500

_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_OCI_FOREIGN_LAYER = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_DOCKER_FOREIGN_LAYER = "application/vnd.docker.image.rootfs.foreign.diff.tar"

# Layer media types -> the same layer's OCI media type.
_LAYERS = {
    f"{kind}{sign}{compression}": f"{oci}{f'+{compression}' if compression else ''}"
    for kind, sign, oci in (
        (_OCI_LAYER, "+", _OCI_LAYER),
        (_OCI_FOREIGN_LAYER, "+", _OCI_FOREIGN_LAYER),
        (_DOCKER_LAYER, ".", _OCI_LAYER),
        (_DOCKER_FOREIGN_LAYER, ".", _OCI_FOREIGN_LAYER),
    )
    for compression in ("gzip", "zstd")
} | {
    _OCI_LAYER: _OCI_LAYER,
    _OCI_FOREIGN_LAYER: _OCI_FOREIGN_LAYER,
    _DOCKER_LAYER: _OCI_LAYER,
    _DOCKER_FOREIGN_LAYER: _OCI_FOREIGN_LAYER,
}
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_LARGEST_SIZE = 1 << 62


class InvalidManifest(ValueError):
    """A document is not what the specification says; the text names the field or the way out."""


@attrs.frozen
class Descriptor:
    """A blob that a document points to: ``digest`` is ``sha256:<hex>``, ``size`` in bytes."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None


@attrs.frozen
class ImageManifest:
    """One platform's image: ``layers`` bottom first, their media types in OCI's names."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


@attrs.frozen
class ImageIndex:
    """An image's manifests, one for each platform."""

    manifests: tuple[Descriptor, ...]


def parse_manifest(data: bytes, content_type: str | None) -> ImageManifest | ImageIndex:
    """Take apart what a registry answered for a manifest.

    ``content_type`` (the answer's, or the descriptor's media type) counts only where the document
    does not say itself what it is.

    Raises:
        InvalidManifest: it is neither an image's manifest nor an index of such.
    """
    document = json_object(data, "the manifest")
    if document.get("schemaVersion") == 1:
        raise InvalidManifest("it is of docker's schema 1, long retired: push the image anew")
    if "layers" in document and "manifests" in document:
        # Which one is meant would be anyone's guess (CVE-2021-41190).
        raise InvalidManifest("the manifest has both layers and manifests")
    media_type = document.get("mediaType") or (content_type or "").partition(";")[0].strip()
    if media_type in (OCI_INDEX, DOCKER_INDEX):
        entries = _array(document, "manifests")
        return ImageIndex(
            tuple(_descriptor(entry, f"manifests[{n}]") for n, entry in enumerate(entries))
        )
    if media_type in (OCI_MANIFEST, DOCKER_MANIFEST):
        return _image_manifest(document, str(media_type))
    raise InvalidManifest(f"the manifest is of the unknown type {str(media_type)[:100]!r}")


def _image_manifest(document: Mapping[str, object], media_type: str) -> ImageManifest:
    config = _descriptor(document.get("config"), "config")
    if config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        raise InvalidManifest(
            f"it is not a container image: its config is of type {config.media_type[:100]!r}"
        )
    if config.size > LARGEST_CONFIG:
        raise InvalidManifest(f"its config of {config.size} bytes is above {LARGEST_CONFIG}")
    entries = _array(document, "layers")
    if len(entries) > MOST_LAYERS:
        raise InvalidManifest(f"it has {len(entries)} layers, above overlayfs's {MOST_LAYERS}")
    layers = []
    for n, entry in enumerate(entries):
        layer = _descriptor(entry, f"layers[{n}]")
        if layer.media_type not in _LAYERS:
            raise InvalidManifest(
                f"layers[{n}] is of type {layer.media_type[:100]!r}, and not a tar, plain or "
                "compressed with gzip or zstd"
            )
        layers.append(attrs.evolve(layer, media_type=_LAYERS[layer.media_type]))
    return ImageManifest(media_type, config, tuple(layers))


def as_oci(data: bytes) -> bytes:
    """A schema 2 manifest in OCI's media types, for tools that read an OCI layout.

    The blobs that it points to, the config among them, are the same.
    """
    document = json_object(data, "the manifest")
    document["mediaType"] = OCI_MANIFEST
    config = document["config"]
    assert isinstance(config, dict)
    config["mediaType"] = OCI_CONFIG
    for layer in _array(document, "layers"):
        assert isinstance(layer, dict)
        layer["mediaType"] = _LAYERS[layer["mediaType"]]
    return orjson.dumps(document)


def json_object(data: bytes, what: str) -> dict[str, object]:
    """The JSON object that `data` holds; raises InvalidManifest, which names it `what`."""
    try:
        document = orjson.loads(data)
    except ValueError as error:  # nesting that is too deep among them
        raise InvalidManifest(f"{what} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidManifest(f"{what} is not a JSON object")
    return document


def _array(document: Mapping[str, object], key: str) -> list[object]:
    value = document.get(key)
    if not isinstance(value, list):
        raise InvalidManifest(f"the manifest's {key} is not an array")
    return value


def _descriptor(value: object, where: str) -> Descriptor:
    if not isinstance(value, dict):
        raise InvalidManifest(f"{where} is not a descriptor")
    media_type, digest, size = (value.get(key) for key in ("mediaType", "digest", "size"))
    if not isinstance(media_type, str):
        raise InvalidManifest(f"{where} has no mediaType")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise InvalidManifest(f"{where} has no sha256 digest")
    if type(size) is not int or not 0 <= size < _LARGEST_SIZE:
        raise InvalidManifest(f"{where} has no size")
    return Descriptor(media_type, digest, size, _platform(value.get("platform")))


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    os, architecture, variant = (value.get(key) for key in ("os", "architecture", "variant"))
    if not isinstance(os, str) or not isinstance(architecture, str):
        return None
    return normalize(os, architecture, variant if isinstance(variant, str) else None)
