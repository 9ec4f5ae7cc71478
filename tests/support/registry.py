"""A real registry, and images pushed into it by skopeo."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from initramfs.local_registry import LocalRegistry, local_registry
from tests.support.commands import run


@pytest.fixture(scope="session")
def registry() -> Iterator[LocalRegistry]:
    """Debian's docker-registry over plain HTTP on loopback, empty at first, shared by all tests.

    Tests push under names of their own; one that damages the store starts its own with
    `local_registry()`.
    """
    with local_registry() as server:
        yield server


def push(
    registry: LocalRegistry,
    layout: Path,
    tag: str,
    name: str,
    *,
    manifest_format: str | None = None,
) -> str:
    """Copy `oci:layout:tag`, all its platforms, to the registry; the reference it now has there.

    Bit for bit, or converted to `manifest_format`: skopeo's `v2s2` is docker's schema 2.
    """
    reference = f"{registry.address}/{name}:{tag}"
    run(
        "skopeo",
        "--insecure-policy",
        "copy",
        "--quiet",
        "--all",
        # Otherwise skopeo compresses what is not, and the image is another one.
        *(["--format", manifest_format] if manifest_format else ["--preserve-digests"]),
        "--dest-tls-verify=false",
        f"oci:{layout}:{tag}",
        f"docker://{reference}",
    )
    return reference
