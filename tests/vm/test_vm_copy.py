"""Directories as tar streams in a VM: its own kernel, its disk's file system, over vsock."""

import os
from pathlib import Path

import pytest

from protocol import requests, responses
from protocol.client import AgentClient
from tests.protocol.sessions import run_innkeep
from tests.support import trees
from tests.support.commands import run
from tests.support.execution import pull, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine
from tests.support.streams import contents, entry, stream, symlink
from tests.support.transfers import read_tar, write_tar
from tests.support.tree import describe, differences

# Under emulation a boot takes seconds, and so does a container.
pytestmark = pytest.mark.timeout(180)

DONE = responses.Ok({"remarks": []})


def odd(root: Path) -> None:
    trees.odd_entries(root)
    (root / "special/null").unlink()
    (root / "special/disk").unlink()
    os.removexattr(root / "attributes/trusted", "trusted.innkeep")


async def test_a_tree_goes_to_the_disk_and_comes_back_as_it_was(
    vm_client: AgentClient, tmp_path: Path
) -> None:
    data = trees.archive(odd)
    assert await write_tar(vm_client, "/storage/tree", data) == DONE
    back = await read_tar(vm_client, "/storage/tree")
    options = ("--same-permissions", "--xattrs", "--xattrs-include=*", "--numeric-owner")
    for name, packed in (("sent", data), ("back", back)):
        (tmp_path / name).mkdir()
        run("tar", "--extract", *options, "-C", tmp_path / name, stdin=packed)
    assert differences(describe(tmp_path / "sent"), describe(tmp_path / "back")) == []


async def test_a_container_is_written_to_as_it_sees_itself_and_nothing_beside_it(
    vm_client: AgentClient, images: Images
) -> None:
    reference = images.busybox.reference_from(LOOPBACK_IN_VM)
    await pull(vm_client, reference)
    start = requests.Run(reference, ("mkdir", "/data"), persistent_overlay_id="copied")
    await vm_client.request(start)
    entries = [
        symlink("absolute", "/data"),
        entry("absolute/new", b"inside"),
        symlink("out", "../../../../../../etc"),
        entry("out/canary", b"inside, too"),
    ]
    into = {"persistent_overlay_id": "copied"}
    assert await write_tar(vm_client, "/", stream(entries), **into) == DONE
    assert await shell(vm_client, "ls /etc/canary 2>/dev/null || echo none") == "none\n"
    whole = contents(await read_tar(vm_client, "/", **into))
    assert (whole["./data/new"], whole["./etc/canary"]) == (b"inside", b"inside, too")
    await vm_client.request(requests.CleanupOverlay("persistent-copied"))


async def test_the_command_line_copies_both_ways(vm: Machine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_000))
    os.utime(file, ns=(0, 1_600_000_000_123_456_789))
    for arguments in (
        (str(file), "vm:/storage/file"),
        ("vm:/storage/file", str(tmp_path / "back")),
    ):
        result = await run_innkeep(vm.address, "cp", *arguments)
        assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert (tmp_path / "back").stat().st_mtime_ns == 1_600_000_000_123_456_789
