"""What is formatted, and what never is. Plain files stand for the disks; real tools look at them.

Mounting them is tested where a kernel is ours, in tests/vm.
"""

import subprocess
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.storage import disk
from agent.storage.disk import Disk
from agent.storage.usage import usage_of
from protocol.errors import ErrorCode

MIB = 1024 * 1024


@pytest.fixture
def device(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    with file.open("wb") as new:
        new.truncate(16 * MIB)
    return file


def test_an_empty_disk_has_no_signature_and_counts_as_blank(device: Path) -> None:
    assert disk.signature(str(device)) is None
    disk.refuse_unless_blank(str(device))


def test_a_formatted_disk_is_recognised(device: Path) -> None:
    disk.format_ext4(str(device))
    assert disk.signature(str(device)) == "ext4"


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
    assert disk.signature(str(device)) == found


@pytest.mark.parametrize("position", [0, MIB - 1, 15 * MIB, 16 * MIB - 1])
def test_a_disk_with_unknown_data_at_either_end_is_never_blank(device: Path, position: int) -> None:
    with device.open("r+b") as file:
        file.seek(position)
        file.write(b"x")
    with pytest.raises(AgentError, match="data of no known file system") as refusal:
        disk.refuse_unless_blank(str(device))
    assert refusal.value.code is ErrorCode.FORMAT_FAILED
    assert str(device) in refusal.value.message


def test_a_disk_smaller_than_its_ends_is_looked_at_whole(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(1000) + b"x")
    with pytest.raises(AgentError):
        disk.refuse_unless_blank(str(small))


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
