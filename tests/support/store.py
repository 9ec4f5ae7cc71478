"""A look into the agent's content store from outside."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.support import commands
from tests.support.layout import digest_of


def wrong_blobs(storage: Path) -> list[str]:
    """The blobs below the storage directory whose content is not what their name says."""
    return [
        path.name
        for path in (storage / "oci/blobs/sha256").iterdir()
        if digest_of(path.read_bytes()) != f"sha256:{path.name}"
    ]


def lacking_bytes(storage: Path, sizes: dict[str, int]) -> dict[str, int]:
    """What the store still needs of each of these blobs; those that it has whole are left out."""
    lacking = {}
    for digest, size in sizes.items():
        name = digest.removeprefix("sha256:")
        if (storage / "oci/blobs/sha256" / name).exists():
            continue
        beginning = storage / "oci/ingest" / name
        stored = beginning.stat().st_size if beginning.exists() else 0
        if stored < size:
            lacking[digest] = size - stored
    return lacking


def unfinished(storage: Path) -> list[str]:
    """What only a pull that goes on, or one that was cut off, has in the store."""
    paths = [*(storage / "oci/ingest").iterdir(), *(storage / "erofs").glob("*.partial")]
    return [str(path.relative_to(storage)) for path in paths]


def inventory(storage: Path) -> dict[str, int]:
    """Everything that pulls leave, with its size in bytes; beginnings of no bytes do not count."""
    found = {
        str(path.relative_to(storage)): path.lstat().st_size
        for part in ("oci", "erofs")
        for path in (storage / part).rglob("*")
        if not path.is_dir()
    }
    nothing = {path for path, size in found.items() if path.startswith("oci/ingest/") and not size}
    mounted = {f"layers/{path.name}": 0 for path in (storage / "layers").iterdir()}
    return {path: size for path, size in found.items() if path not in nothing} | mounted


def read_by_skopeo(storage: Path, references: Iterable[str]) -> None:
    """Let skopeo inspect images and copy them out, every blob verified; CommandError if not."""
    for reference in references:
        layout = f"oci:{storage}/oci:{reference}"
        commands.run("skopeo", "inspect", layout)
        with tempfile.TemporaryDirectory(prefix="innkeep-copy-") as copy:
            commands.run("skopeo", "--insecure-policy", "copy", "--quiet", layout, f"dir:{copy}")
