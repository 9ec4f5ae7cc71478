"""What is formatted, and what never is. Plain files stand for the disks; real tools look at them.

Mounting them is tested where a kernel is ours, in tests/vm.
"""

import itertools
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.storage import device as devices
from agent.storage import ext4
from agent.storage.disk import Disk, prepare
from agent.storage.unfinished import MARK, is_marked
from agent.storage.usage import usage_of
from protocol.errors import ErrorCode
from tests.support.commands import find_program
from tests.support.rounds import rounds

MIB = 1024 * 1024


@pytest.fixture
def device(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    with file.open("wb") as new:
        new.truncate(16 * MIB)
    return file


def test_an_empty_disk_has_no_signature_and_counts_as_blank(device: Path) -> None:
    assert devices.signature(str(device)) is None
    devices.refuse_unless_blank(str(device))


def test_a_formatted_disk_is_recognised(device: Path) -> None:
    ext4.make(str(device))
    assert devices.signature(str(device)) == "ext4"


# mke2fs, ended by force at one of its writes.
ENDING = """\
#!/bin/sh
exec strace -qq -o /dev/null -e inject=pwrite64,fallocate:signal=KILL:when={write} {mke2fs} "$@"
"""


@pytest.mark.parametrize("size", [16 * MIB, 1536 * MIB])
def test_a_disk_whose_formatting_was_cut_short_at_any_write_is_formatted_the_next_time(
    device: Path, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_program("strace")
    mke2fs = find_program("mke2fs")
    path = os.environ["PATH"]
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/mke2fs"
    looked_foreign = 0
    for write in itertools.count(1, rounds(7, 1)):
        device.unlink()
        with device.open("wb") as new:
            new.truncate(size)
        script.write_text(ENDING.format(write=write, mke2fs=mke2fs))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{path}")
        try:
            ext4.make(str(device))
        except AgentError:
            pass
        else:
            break
        monkeypatch.setenv("PATH", path)
        with suppress(AgentError):
            devices.refuse_unless_blank(str(device))
            looked_foreign -= 1
        looked_foreign += 1
        prepare(str(device))
        subprocess.run(["e2fsck", "-fn", device], check=True, capture_output=True)
        assert not is_marked(str(device))
    # Most moments are of that kind.
    assert looked_foreign > 3
    assert not is_marked(str(device))


def test_a_mark_on_a_file_system_that_was_in_use_is_not_heeded(device: Path) -> None:
    ext4.make(str(device))
    subprocess.run(["debugfs", "-w", "-R", "ssv mtime now", device], check=True)
    with device.open("r+b") as file:
        file.seek(-MIB, os.SEEK_END)
        file.write(MARK)
    before = device.read_bytes()
    assert is_marked(str(device))
    prepare(str(device))
    assert device.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["mkfs.ext2", "-q"], "ext2"),
        (["mkswap"], "swap"),
        (["sfdisk", "-q"], "dos"),
    ],
)
def test_what_others_put_on_a_disk_is_recognised(
    device: Path, command: list[str], found: str
) -> None:
    subprocess.run(
        [*command, device], input=b"label: dos\n,\n", check=True, stdout=subprocess.DEVNULL
    )
    assert devices.signature(str(device)) == found


@pytest.mark.parametrize("position", [0, MIB - 1, 15 * MIB, 16 * MIB - 1])
def test_a_disk_with_unknown_data_at_either_end_is_never_blank(device: Path, position: int) -> None:
    with device.open("r+b") as file:
        file.seek(position)
        file.write(b"x")
    with pytest.raises(AgentError, match="data of no known file system") as refusal:
        devices.refuse_unless_blank(str(device))
    assert refusal.value.code is ErrorCode.FORMAT_FAILED
    assert str(device) in refusal.value.message


def test_a_disk_smaller_than_its_ends_is_looked_at_whole(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(1000) + b"x")
    with pytest.raises(AgentError):
        devices.refuse_unless_blank(str(small))


def test_a_disk_that_holds_something_else_is_named_and_left_as_it_is(
    device: Path, tmp_path: Path
) -> None:
    subprocess.run(["mkswap", device], check=True, stdout=subprocess.DEVNULL)
    before = device.read_bytes()
    with pytest.raises(AgentError, match="swap") as refusal:
        Disk(tmp_path / "storage", device=str(device)).bring_up()
    assert str(device) in refusal.value.message
    assert device.read_bytes() == before


def test_a_disk_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="/nowhere/vdx"):
        Disk(tmp_path / "storage", device="/nowhere/vdx").bring_up()


def damaged(device: Path, *commands: str) -> None:
    """An ext4 that debugfs(8) has had its way with; it was then left with an error."""
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-O", "^metadata_csum", device], check=True)
    for command in (*commands, "ssv state 2"):
        subprocess.run(["debugfs", "-w", "-R", command, device], check=True, capture_output=True)


def test_a_file_system_that_was_left_in_good_order_is_not_touched(device: Path) -> None:
    ext4.make(str(device))
    before = device.read_bytes()
    prepare(str(device))
    assert device.read_bytes() == before


def test_what_can_be_mended_without_loss_is(device: Path) -> None:
    damaged(device, "ssv free_blocks_count 1")
    assert not ext4.Superblock.read(str(device)).is_clean
    prepare(str(device))
    assert ext4.Superblock.read(str(device)).is_clean
    checked = subprocess.run(["e2fsck", "-fn", device], capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_what_cannot_be_mended_without_loss_is_told(device: Path) -> None:
    damaged(device, "clri <2>")
    with pytest.raises(AgentError, match=f"mount {device}: .*run e2fsck on the disk") as refusal:
        prepare(str(device))
    assert refusal.value.code is ErrorCode.MOUNT_FAILED
    assert devices.signature(str(device)) == "ext4"


def test_a_disk_that_was_cut_off_is_told_with_both_sizes_and_left_as_it_is(device: Path) -> None:
    ext4.make(str(device))
    with device.open("r+b") as file:
        file.truncate(8 * MIB)
    before = device.read_bytes()
    with pytest.raises(AgentError, match=f"has {16 * MIB} bytes .* only {8 * MIB}"):
        prepare(str(device))
    assert device.read_bytes() == before


@pytest.mark.parametrize("block_bytes", [1024, 4096])
@pytest.mark.parametrize("option", ["64bit", "^64bit"])
def test_a_file_systems_size_is_known(device: Path, block_bytes: int, option: str) -> None:
    blocks = 12 * MIB // block_bytes
    options = ["-b", str(block_bytes), "-O", option]
    subprocess.run(["mke2fs", "-q", "-t", "ext4", *options, device, str(blocks)], check=True)
    assert ext4.Superblock.read(str(device)).size_bytes == 12 * MIB


def test_a_plain_directory_gets_the_layout_and_keeps_what_it_has(tmp_path: Path) -> None:
    kept = tmp_path / "storage" / "workspace" / "notes"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    Disk(tmp_path / "storage").bring_up()
    Disk(tmp_path / "storage").bring_up()
    assert sorted(each.name for each in (tmp_path / "storage").iterdir()) == [
        "layers",
        "overlays",
        "workspace",
    ]
    assert kept.read_text() == "mine"


def test_usage_is_what_df_says(tmp_path: Path) -> None:
    said = subprocess.run(
        ["df", "--block-size=1", "--output=size", tmp_path], capture_output=True, check=True
    )
    usage = usage_of(tmp_path)
    assert usage.total_bytes == int(said.stdout.split()[-1])
    assert 0 < usage.used_bytes <= usage.total_bytes
