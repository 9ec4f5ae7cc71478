"""Whether storage and shares answer."""

import os
from pathlib import Path

import pytest
import trio

from agent.linux.mount import MNT_DETACH, MS_BIND, MS_RDONLY, MS_REMOUNT, mount, umount2
from agent.machine.answering import check, shares
from protocol.values import MountCheck

MOUNTINFO = r"""
22 1 0:20 / / rw - overlay root rw,lowerdir=/agent:/base
30 22 0:31 / /mnt/virtiofs/home rw,nosuid - virtiofs home rw
31 22 0:31 /sub /storage/overlays/persistent-x/merged/home rw - virtiofs home rw
32 22 0:32 / /mnt/virtiofs/my\040share ro,nosuid shared:7 - virtiofs my\040share rw
33 22 254:0 / /storage rw,noatime - ext4 /dev/vda rw
""".strip()


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_each_share_is_asked_once_wherever_it_is_bound() -> None:
    assert shares(MOUNTINFO.splitlines()) == ["/mnt/virtiofs/home", "/mnt/virtiofs/my share"]


async def test_what_answers_is_told_and_nothing_is_left_of_the_question(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    done = await check(tmp_path, [str(shared)])
    assert done == MountCheck(ok=True, checked=(str(tmp_path), str(shared)))
    assert names(tmp_path) == ["shared"]


async def test_a_storage_that_takes_no_writes_and_a_share_that_is_gone_are_both_named(
    tmp_path: Path,
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    mount(storage, storage, flags=MS_BIND)
    try:
        mount(None, storage, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
        done = await check(storage, [str(tmp_path / "gone")])
    finally:
        umount2(storage, MNT_DETACH)
    assert not done.ok
    assert done.error is not None
    assert f"{tmp_path}/gone: stat ended with status 1: " in done.error
    assert f"{storage}: Read-only file system" in done.error


async def test_a_share_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any program that does not end: what hangs on a share cannot even be killed."""
    program, held = tmp_path / "stat", tmp_path / "held"
    program.write_text(f"#!/bin/sh\nread word <{held}\n")
    program.chmod(0o755)
    os.mkfifo(held)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = await check(tmp_path, ["/mnt/virtiofs/silent"], limit_s=0.5)
    assert done.error == "/mnt/virtiofs/silent: no answer within 0.5 s"
    # It ends when the share is back, and so does the thread that was left with it.
    async with await trio.open_file(held, "w") as back:
        await back.write("\n")
