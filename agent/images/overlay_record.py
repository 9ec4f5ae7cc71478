"""What an overlay is made of, kept beside its upper directory."""

from __future__ import annotations

import errno
from pathlib import Path

import attrs
import orjson

from agent.images.atomic_file import write_atomically
from agent.images.content_store import StoredImage
from agent.images.manifest import DIGEST
from agent.images.packed_share import unpacked_id

_NAME = "overlay.json"


@attrs.frozen
class OverlayRecord:
    """The image that an overlay is pinned to, whatever its reference means later.

    ``layers`` are (blob digest, diff_id), bottom first; or what stands for these where the layer is
    a directory of a packed share.
    """

    reference: str
    config_digest: str
    layers: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, image: StoredImage) -> OverlayRecord:
        layers = tuple((layer.digest, layer.diff_id) for layer in image.layers)
        return cls(image.reference, image.config_digest, layers)

    @property
    def digests(self) -> frozenset[str]:
        """The digests of its layers' blobs, and their diff_ids."""
        return frozenset().union(*self.layers)


def read_record(directory: Path) -> OverlayRecord | None:
    """The record of an overlay; None where there is none, so that it was never mounted.

    Raises:
        OSError: it cannot be read, or is damaged.
    """
    path = directory / _NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        document = orjson.loads(data)
        layers = tuple((layer["digest"], layer["diff_id"]) for layer in document["layers"])
        if not all(all(map(DIGEST.fullmatch, layer)) or unpacked_id(*layer) for layer in layers):
            raise ValueError("a layer without digest")
        return OverlayRecord(str(document["reference"]), str(document["config_digest"]), layers)
    except (KeyError, TypeError, ValueError) as error:
        raise OSError(errno.EUCLEAN, "the overlay's record is damaged", str(path)) from error


def write_record(directory: Path, record: OverlayRecord) -> None:
    """Keep a record, durably: after this the overlay exists."""
    document = {
        "reference": record.reference,
        "config_digest": record.config_digest,
        "layers": [{"digest": digest, "diff_id": diff_id} for digest, diff_id in record.layers],
    }
    write_atomically(directory / _NAME, orjson.dumps(document), directory)
