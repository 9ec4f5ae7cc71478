"""The measure itself: two equal trees are equal, and no difference of any kind is overlooked."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import trees
from tests.support.commands import run
from tests.support.tree import describe, differences


@pytest.fixture
def original(tmp_path: Path) -> Path:
    root = tmp_path / "original"
    root.mkdir()
    trees.odd_entries(root)
    return root


def test_a_tree_is_equal_to_its_exact_copy(original: Path, tmp_path: Path) -> None:
    run("cp", "--archive", original, tmp_path / "copy")
    assert differences(describe(original), describe(tmp_path / "copy")) == []


def hard_link_broken(root: Path) -> None:
    status = (root / "b/hard").stat()
    (root / "b/hard").unlink()
    run("cp", "--archive", root / "a/original", root / "b/hard")
    os.utime(root / "b", ns=(status.st_mtime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: (root / "empty/new").touch(), "'empty/new': not expected"),
        (lambda root: (root / "special/fifo").unlink(), "'special/fifo': missing"),
        (lambda root: (root / "modes/0644").chmod(0o645), "mode"),
        (lambda root: os.chown(root / "modes/0644", 1, -1), "uid"),
        (lambda root: os.chown(root / "a/dangling", -1, 1, follow_symlinks=False), "gid"),
        (lambda root: os.utime(root / "empty", ns=(0, 1)), "mtime_ns"),
        (lambda root: (root / "a/original").write_text("One inode, three names\n"), "sha256"),
        (lambda root: (root / "modes/0644").write_text("longer\n"), "size"),
        (lambda root: os.setxattr(root / "empty", "user.new", b"1"), "xattrs"),
        (lambda root: os.removexattr(root / "attributes/user", "user.long"), "xattrs"),
        (hard_link_broken, "same_inode"),
    ],
)
def test_a_difference_is_named(
    original: Path, change: Callable[[Path], object], named: str
) -> None:
    before = describe(original)
    change(original)
    assert any(named in line for line in differences(before, describe(original)))
    assert differences(describe(original), describe(original)) == []
