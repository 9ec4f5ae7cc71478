"""A share of packed layers is the image, by whatever name, and needs no registry."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from protocol.errors import ErrorCode
from tests.support import trees
from tests.support.crash import kill_agent
from tests.support.execution import pull, refusal, run, shell
from tests.support.layout import digest_of
from tests.support.machine import Machine, booted

NO_REFERENCE = "what ever:::"


def add(share: Path, name: str, **files: str) -> None:
    """A layer's directory: with busybox, or with these files in /etc."""
    root = share / name
    root.mkdir(parents=True)
    if not files:
        trees.busybox(root)
    for file, text in files.items():
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc" / file).write_text(text)


@contextmanager
def packed(directory: Path) -> Iterator[Machine]:
    """A machine whose packed layers are in the directory `share` of its storage, if it is there."""
    word = "innkeep.packed_layers=/storage/share:/packed_layers"
    with booted(directory, options=[f"--append={word}"], in_own_network=True) as machine:
        yield machine


def share_in(directory: Path) -> Path:
    share = directory / "storage/share"
    share.mkdir(parents=True)
    return share


async def answered(client: AgentClient, request: Any) -> Any:
    answer = await client.request(request)
    assert isinstance(answer, responses.Ok), answer
    return answer.data


async def exported(client: AgentClient, index: int) -> bytes:
    request = requests.ExportLayer(image_digest="packed", layer_index=index)
    data = b""
    async with client.stream(request) as stream:
        async for frame in stream:
            assert isinstance(frame, responses.DataChunk), frame
            data += frame.data
    return data


async def test_any_reference_is_the_image_without_a_registry(tmp_path: Path) -> None:
    share = share_in(tmp_path)
    add(share, "10-base")
    add(share, "20-top", note="from the top\n", passwd="root:x:0:0::/:/bin/sh\n")
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            info = await pull(client, NO_REFERENCE)
            assert (info["reference"], info["digest"], info["size"]) == (NO_REFERENCE, "packed", 0)
            assert info["layers"] == ["sha256:10-base", "sha256:20-top"]
            assert (info["layer_count"], info["os"]) == (2, "linux")
            assert await answered(client, requests.Query(image=NO_REFERENCE)) == info
            (listed,) = await answered(client, requests.ListImages())
            assert listed == {**info, "reference": "packed"}
            plan = await answered(client, requests.Pull(image="", dry_run=True))
            assert (plan["fetch_bytes"], plan["digest"]) == (0, "packed")
            cat = ("cat", "/etc/note", "/etc/passwd", "/etc/group")
            for name in (NO_REFERENCE, "alpine", ""):
                done = await run(client, name, *cat)
                assert done.stdout.startswith(b"from the top\nroot:x:0:0::/:/bin/sh\nroot:x:0:\n")
            none = await refusal(client, requests.Run(image="alpine", command=()))
            assert none.message == (
                "no command given and image 'alpine' defines no entrypoint or cmd"
            )
            assert await shell(client, "cat /storage/layers/20-top/etc/note") == "from the top\n"
            assert await shell(client, "cat /packed_layers/20-top/etc/note") == "from the top\n"
            script = "for each in /storage/layers/20-top /packed_layers; do ! touch $each/no; done"
            await shell(client, f"({script}) 2>/dev/null")
            error = await refusal(
                client, requests.ExportLayer(image_digest="packed", layer_index=1)
            )
            assert error.code == ErrorCode.EXPORT_FAILED.value
            assert "as the directory '20-top'" in error.message
    assert "registry" not in machine.console_text()


async def test_an_order_and_a_config_beside_the_layers_are_the_image_s(tmp_path: Path) -> None:
    share = share_in(tmp_path)
    add(share, "a-top", note="top\n")
    add(share, "b-middle", note="middle\n")
    add(share, "c-base")
    (share / "layer-order").write_text("c-base\nb-middle\nnone\na-top\n")
    (share / "config.json").write_text(
        '{"config": {"Cmd": ["sh", "-c", "cat /etc/note; echo $FROM"], "Env": ["FROM=config"]}}'
    )
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            done = await run(client, "x")
            assert done.stdout == b"top\nconfig\n"


async def test_a_tar_is_made_a_layer_once_and_outlives_collections(tmp_path: Path) -> None:
    share = share_in(tmp_path)
    add(share, "1")
    tar = trees.archive(trees.numbered(7))
    (share / "2.tar").write_bytes(tar)
    diff_id = digest_of(tar)
    image = tmp_path / f"storage/erofs/{diff_id.removeprefix('sha256:')}.erofs"
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            info = await pull(client, "x")
            assert info["layers"] == ["sha256:1", diff_id]
            assert (await run(client, "x", "cat", "/layers/top")).stdout == b"7\n"
            assert await exported(client, 1) == tar
            built = image.stat().st_ino
            everything = requests.GarbageCollect(dry_run=False, purge_all=True)
            assert (await answered(client, everything))["freed_bytes"] == 0
        await kill_agent(machine)
        async with open_client(machine.address) as client:
            assert (await answered(client, everything))["layers"] == []
            assert (await run(client, "x", "cat", "/layers/007")).stdout == b"layer 7\n"
    newer = trees.archive(trees.numbered(8))
    (share / "2.tar").write_bytes(newer)
    assert image.stat().st_ino == built
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            assert (await run(client, "x", "cat", "/layers/top")).stdout == b"8\n"
            assert (await answered(client, everything))["layers"] == [diff_id]
    assert not image.exists()


async def test_an_overlay_survives_the_agent_and_the_machine(tmp_path: Path) -> None:
    share = share_in(tmp_path)
    add(share, "1")
    (share / "2.tar").write_bytes(trees.archive(trees.numbered(7)))
    here = {"persistent_overlay_id": "kept"}
    everything = requests.GarbageCollect(dry_run=False, purge_all=True)
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            await run(client, "x", "sh", "-c", "echo kept >/etc/note", **here)
            first = requests.PrepareOverlay(image=NO_REFERENCE, workload_id="other")
            paths = await answered(client, first)
            assert await shell(client, f"cat {paths['rootfs_path']}/layers/top") == "7\n"
        await kill_agent(machine)
        async with open_client(machine.address) as client:
            assert (await run(client, "y", "cat", "/etc/note", **here)).stdout == b"kept\n"
            await answered(client, everything)
            await answered(client, requests.Shutdown())
    (share / "2.tar").write_bytes(trees.archive(trees.numbered(8)))
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            await answered(client, everything)
            # It is pinned to what it was made of.
            done = await run(client, "z", "cat", "/etc/note", "/layers/top", **here)
            assert done.stdout == b"kept\n7\n"
            await answered(client, requests.Shutdown())
    (tmp_path / "unnamed").mkdir()
    with booted(tmp_path / "unnamed", storage=tmp_path / "storage") as machine:
        async with open_client(machine.address) as client:
            error = await refusal(client, requests.PrepareOverlay("alpine", "persistent-kept"))
            assert error.message == (
                "the packed layer '1' is not here, for this boot names no share of packed layers"
            )
            await answered(client, requests.CleanupOverlay("persistent-kept"))


async def test_a_share_without_an_image_is_told_and_all_else_works(tmp_path: Path) -> None:
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            error = await refusal(client, requests.Pull(image="x"))
            assert error.code == ErrorCode.PULL_FAILED.value
            assert error.message == (
                "find the packed layers: mount '/storage/share' at '/packed_layers': "
                "No such file or directory"
            )
            assert error.message in machine.console_text()
            assert await shell(client, "echo fine") == "fine\n"
            assert (await answered(client, requests.StorageStatus()))["ready"] is True
            share = tmp_path / "storage/share"
            share.mkdir()
            error = await refusal(client, requests.Run(image="x", command=("true",)))
            assert error.message == (
                "find the packed layers: /storage/share: there are no directories or tars in it"
            )
            (share / "1.tar").write_bytes(b"no tar" * 1000)
            error = await refusal(client, requests.Query(image="x"))
            assert error.code == ErrorCode.NOT_FOUND.value
            assert error.message.startswith("find the packed layers: sha256:")
            (share / "1.tar").unlink()
            # Found when it is there.
            add(share, "1")
            assert (await run(client, "x", "echo", "up")).stdout == b"up\n"


async def test_a_shutdown_does_not_wait_for_tars_that_are_being_read(tmp_path: Path) -> None:
    share = share_in(tmp_path)
    (share / "1.tar").touch()
    # Nobody reads that to its end.
    os.truncate(share / "1.tar", 1 << 40)
    with packed(tmp_path) as machine:
        async with open_client(machine.address) as client:
            # With the storage there, it is being read.
            assert (await answered(client, requests.StorageStatus()))["ready"] is True
            await answered(client, requests.Shutdown())
        assert await trio.to_thread.run_sync(machine.wait) == 0
    assert not (tmp_path / "storage/packed.json").exists()
