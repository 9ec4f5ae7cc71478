"""What a pull asks of the kernel, and when: nothing has its name before its contents are safe."""

import re
from pathlib import Path

import pytest

from initramfs.local_registry import LocalRegistry
from protocol.client import open_client
from tests.support.execution import pull
from tests.support.images import Images
from tests.support.machine import booted
from tests.support.syscalls import Call, traced

WRITES = ("write", "writev", "pwrite64", "pwritev", "ftruncate", "fallocate", "copy_file_range")
RENAMES = ("rename", "renameat", "renameat2")
FILE_SYNCS = ("fsync", "fdatasync")
ALL_SYNCS = ("sync", "syncfs")
# What is kept, and is the worth of a pull: all of it is renamed into its place.
KEPT = re.compile(r"/storage/(?:oci/(?:blobs|unpacked)/.+|oci/index\.json|erofs/.+\.erofs)")
_PATH = re.compile(r'"([^"]*)"')
_DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")


def descriptor_path(call: Call) -> str:
    found = _DESCRIPTOR.match(call.arguments)
    return found[1] if found else ""


def is_synced(calls: list[Call], path: str, after: int, before: int) -> bool:
    """Whether a sync of a path, or of everything, began and ended in between."""
    return any(
        call.succeeded
        and call.ended is not None
        and after < call.begun
        and call.ended < before
        and (call.name in ALL_SYNCS or (call.name in FILE_SYNCS and descriptor_path(call) == path))
        for call in calls
    )


@pytest.mark.parametrize("name", ["large", "docker_schema2"])
async def test_what_gets_its_name_is_synced_before_and_its_directory_after(
    registry: LocalRegistry, images: Images, tmp_path: Path, name: str
) -> None:
    """And all of it before the index names the image, and that before the answer."""
    image = getattr(images, name)
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        async with open_client(machine.address) as client:
            names = ",".join((*WRITES, *RENAMES, *FILE_SYNCS, *ALL_SYNCS))
            with traced(machine.agent_pid(), names, tmp_path / "strace.log") as trace:
                await pull(client, image.reference)
    calls = trace.calls
    renames = [call for call in calls if call.name in RENAMES and call.succeeded]
    kept = []
    for call in renames:
        old, new = _PATH.findall(call.arguments)
        if not KEPT.fullmatch(new):
            continue
        assert call.ended is not None
        kept.append((call, new))
        written = [
            write.ended or 0
            for write in calls
            if write.name in WRITES and descriptor_path(write) == old
        ]
        assert written, old
        assert is_synced(calls, old, max(written), call.begun), f"{new}: contents"
    (index, index_path) = kept[-1]
    assert index_path == "/storage/oci/index.json"
    answer = max(call.begun for call in calls) + 1
    for call, new in kept:
        assert call.ended is not None
        deadline = answer if call is index else index.begun
        directory = new.rpartition("/")[0]
        assert is_synced(calls, directory, call.ended, deadline), f"{new}: directory"
    # A blob, a record and an EROFS image a layer, two documents, and perhaps OCI's form of one.
    assert len(kept) >= 3 * len(image.layers) + 2 + 1
