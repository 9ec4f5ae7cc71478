"""Looking at files, listing, making and removing them."""

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.files import tree
from agent.files.guest_path import GuestPath, Owner
from agent.files.temporary import Site
from agent.images.tree_removal import remove_tree_in
from agent.linux.mount import mount, umount2
from protocol.errors import ErrorCode
from protocol.values import FileEntry, FileInfo


def describe(site: Site, path: str, *, follow: bool = False) -> FileInfo:
    return tree.describe(site.root, GuestPath.parse(path), follow=follow)


def listed(site: Site, path: str = "/", after: str | None = None, limit: int = 100) -> list[str]:
    found = tree.listed(site.root, GuestPath.parse(path), after=after, limit=limit)
    return [entry.name for entry in found.entries]


def remove(site: Site, path: str, *, recursive: bool = False, missing_ok: bool = False) -> None:
    removes = remove_tree_in if recursive else None
    tree.remove(site.root, GuestPath.parse(path), missing_ok=missing_ok, remove_tree=removes)


def test_a_file_is_described_as_lstat_has_it(site: Site, directory: Path) -> None:
    file = directory / "file"
    file.write_bytes(b"12345")
    file.chmod(0o4751)
    os.chown(file, 1000, 1001)
    file.chmod(0o4751)
    os.utime(file, ns=(0, -1_500_000_000))
    assert describe(site, "file") == FileInfo(
        kind="file",
        size=5,
        mode=0o4751,
        uid=1000,
        gid=1001,
        mtime_s=-2,
        mtime_ns=500_000_000,
    )


@pytest.mark.parametrize("ask", [describe, listed, remove])
def test_what_is_not_there_is_told_from_all_else(
    site: Site, directory: Path, ask: Callable[[Site, str], object]
) -> None:
    (directory / "file").touch()
    for path, code in (
        ("/missing", ErrorCode.NOT_FOUND),
        ("/missing/below", ErrorCode.NOT_FOUND),
        ("/file/below", ErrorCode.FILE_IO_FAILED),
    ):
        with pytest.raises(AgentError) as refusal:
            ask(site, path)
        assert refusal.value.code is code


def test_a_link_is_described_itself_unless_it_is_to_be_followed(
    site: Site, directory: Path
) -> None:
    (directory / "target").mkdir()
    (directory / "link").symlink_to("/target")
    link = describe(site, "/link")
    assert (link.kind, link.target) == ("symlink", "/target")
    for followed in (describe(site, "/link", follow=True), describe(site, "/link/")):
        assert (followed.kind, followed.target) == ("directory", None)
    assert describe(site, "/").kind == "directory"


def test_every_kind_of_file_has_a_name(site: Site, directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    for kind, bits in (("char", stat.S_IFCHR), ("block", stat.S_IFBLK), ("socket", stat.S_IFSOCK)):
        os.mknod(directory / kind, bits | 0o600, os.makedev(7, 200))
    for kind in ("fifo", "char", "block", "socket"):
        assert describe(site, kind).kind == kind


def test_entries_come_in_order_and_in_pages(site: Site, directory: Path) -> None:
    names = sorted(f"entry-{number}" for number in range(25))
    for name in names:
        (directory / name).touch()
    assert listed(site) == names
    pages = []
    after = None
    while True:
        page = tree.listed(site.root, GuestPath(()), after=after, limit=10)
        pages += [entry.name for entry in page.entries]
        after = pages[-1]
        if not page.more:
            break
    assert pages == names


def test_a_name_that_is_not_utf8_is_written_with_escapes(site: Site, directory: Path) -> None:
    (directory / os.fsdecode(b"a\xff")).symlink_to(os.fsdecode(b"\xfe"))
    (entry,) = tree.listed(site.root, GuestPath(()), after=None, limit=10).entries
    assert isinstance(entry, FileEntry)
    assert (entry.name, entry.target, entry.escaped) == ("a\\xff", "\\xfe", True)


def test_a_listing_fits_a_frame(site: Site, directory: Path) -> None:
    for number in range(1_200):
        (directory / f"{number:04}").symlink_to("x" * 4_000)
    page = tree.listed(site.root, GuestPath(()), after=None, limit=10_000)
    assert page.more
    assert 1_000 < len(page.entries) < 1_200


def test_what_is_no_directory_is_not_listed(site: Site, directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(AgentError, match="list /file: Not a directory") as refusal:
        listed(site, "/file")
    assert refusal.value.code is ErrorCode.FILE_IO_FAILED


def test_a_directory_is_made_with_its_parents_and_owner(site: Site, directory: Path) -> None:
    make = partial(tree.make_directory, site.root)
    assert make(GuestPath.parse("/a/b/"), Owner(1000, 1001), 0o1770)
    found = (directory / "a" / "b").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o1770, 1000, 1001)
    assert not make(GuestPath.parse("/a/b"), Owner(0, 0), 0o700)
    assert (directory / "a" / "b").stat().st_uid == 1000
    (directory / "file").touch()
    with pytest.raises(AgentError, match="make /file: Not a directory"):
        make(GuestPath.parse("/file"), Owner(), 0o700)


def test_files_links_and_empty_directories_are_removed(site: Site, directory: Path) -> None:
    (directory / "kept").mkdir()
    (directory / "kept" / "file").touch()
    (directory / "link").symlink_to("kept")
    (directory / "file").touch()
    (directory / "empty").mkdir()
    for path in ("/link", "/file", "/empty/"):
        remove(site, path)
    assert [path.name for path in directory.iterdir()] == ["kept"]
    with pytest.raises(AgentError, match="remove /kept: Directory not empty"):
        remove(site, "/kept")


def test_a_tree_is_removed_only_when_that_is_asked_for(site: Site, directory: Path) -> None:
    deep = directory / "tree"
    for _ in range(50):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (directory / "outside").mkdir()
    (directory / "outside" / "kept").touch()
    (directory / "tree" / "link").symlink_to("../outside")
    remove(site, "/tree", recursive=True)
    assert listed(site) == ["outside"]
    assert listed(site, "/outside") == ["kept"]


def test_a_mount_is_not_emptied(site: Site, directory: Path) -> None:
    below = directory / "tree" / "mount"
    below.mkdir(parents=True)
    mount("tmpfs", below, fstype="tmpfs")
    (below / "file").touch()
    try:
        with pytest.raises(AgentError, match="remove /tree: it lies on another mount"):
            remove(site, "/tree", recursive=True)
        assert (below / "file").exists()
    finally:
        umount2(below)


def test_what_is_not_there_is_an_error_unless_it_is_none(site: Site) -> None:
    for path in ("/nothing", "/no/thing"):
        with pytest.raises(AgentError, match="No such file or directory"):
            remove(site, path)
        remove(site, path, missing_ok=True)


def test_a_file_with_a_slash_behind_it_is_no_directory(site: Site, directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(AgentError, match="Not a directory"):
        remove(site, "/file/")
    with pytest.raises(AgentError, match="Not a directory"):
        describe(site, "/file/")
