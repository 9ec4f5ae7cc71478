"""`index.json` of the OCI image layout: the references, and which manifest each one means.

https://github.com/opencontainers/image-spec/blob/main/image-layout.md#indexjson-file
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
import orjson

from agent.images.manifest import OCI_INDEX, OCI_MANIFEST

_REF_NAME = "org.opencontainers.image.ref.name"
_RESOLVED = "innkeep.resolved-digest"
_MANIFEST = "innkeep.manifest-digest"
_PLATFORM = "innkeep.platform"


class InvalidIndex(ValueError):
    """`index.json`, or an entry of it, was not written by us."""


@attrs.frozen
class IndexEntry:
    """A reference, canonical, and what it stands for.

    ``digest`` and ``size`` are of a manifest in OCI's media types: ``manifest_digest``'s own, or
    its copy where that came in docker's. ``resolved`` is the digest of the manifest or index that
    the registry had for the reference when ``platform`` (as text) was chosen from it.
    """

    reference: str
    digest: str
    size: int
    manifest_digest: str
    resolved: str
    platform: str

    def descriptor(self) -> dict[str, object]:
        """The entry as a descriptor of index.json."""
        return {
            "mediaType": OCI_MANIFEST,
            "digest": self.digest,
            "size": self.size,
            "annotations": {
                _REF_NAME: self.reference,
                _RESOLVED: self.resolved,
                _MANIFEST: self.manifest_digest,
                _PLATFORM: self.platform,
            },
        }

    @classmethod
    def of(cls, descriptor: object) -> IndexEntry:
        """The entry that a descriptor of index.json is. Raises InvalidIndex."""
        if not isinstance(descriptor, Mapping):
            raise InvalidIndex("an entry is not a descriptor")
        annotations = descriptor.get("annotations")
        if not isinstance(annotations, Mapping):
            raise InvalidIndex(f"{descriptor.get('digest')} has no annotations")
        digest, size = descriptor.get("digest"), descriptor.get("size")
        words = [annotations.get(key) for key in (_REF_NAME, _MANIFEST, _RESOLVED, _PLATFORM)]
        if not isinstance(digest, str) or not isinstance(size, int):
            raise InvalidIndex("an entry has no digest or no size")
        reference, manifest_digest, resolved, platform = (
            word if isinstance(word, str) else _missing(digest) for word in words
        )
        return cls(reference, digest, size, manifest_digest, resolved, platform)


def render_index(entries: Iterable[IndexEntry]) -> bytes:
    """index.json with these entries."""
    descriptors = [entry.descriptor() for entry in entries]
    return orjson.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": descriptors})


def parse_index(data: bytes) -> list[object]:
    """The descriptors of an index.json, for `IndexEntry.of`. Raises InvalidIndex."""
    try:
        document = orjson.loads(data)
    except ValueError as error:
        raise InvalidIndex(f"not JSON: {error}") from error
    manifests = document.get("manifests") if isinstance(document, dict) else None
    if not isinstance(manifests, list):
        raise InvalidIndex("it has no manifests")
    return manifests


def _missing(digest: str) -> str:
    raise InvalidIndex(f"{digest} has not our annotations")
