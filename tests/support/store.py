"""A look into the agent's content store from outside."""

from pathlib import Path

from tests.support.layout import digest_of


def wrong_blobs(storage: Path) -> list[str]:
    """The blobs below the storage directory whose content is not what their name says."""
    return [
        path.name
        for path in (storage / "oci/blobs/sha256").iterdir()
        if digest_of(path.read_bytes()) != f"sha256:{path.name}"
    ]
