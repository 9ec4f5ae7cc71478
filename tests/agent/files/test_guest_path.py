"""Paths of hosts: what they mean, and that nothing leads out of their root."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.files.guest_path import GuestPath, GuestRoot, Owner, closing
from protocol.errors import ErrorCode
from tests.support.rounds import rounds


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The root's directory; beside it lies what must not be reached."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def root(directory: Path) -> Iterator[GuestRoot]:
    with GuestRoot.opened(directory) as opened:
        yield opened


def read(root: GuestRoot, path: str) -> bytes:
    with closing(root.open_regular(GuestPath.parse(path))) as file:
        return os.read(file, 1 << 20)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("/a/b", "/a/b"),
        ("a/b", "/a/b"),
        ("/", "/"),
        (".", "/"),
        ("./a//b/./c/", "/a/b/c"),
        ("/..a/b..", "/..a/b.."),
    ],
)
def test_a_path_without_a_leading_slash_is_taken_from_the_root(text: str, meant: str) -> None:
    assert str(GuestPath.parse(text)) == meant


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "empty"), ("/a\0b", "NUL"), ("..", "'..'"), ("/a/../b", "'..'"), ("/a/..", "'..'")],
)
def test_a_path_that_is_empty_or_has_a_nul_or_goes_up_is_refused(text: str, named: str) -> None:
    with pytest.raises(AgentError, match=named) as refused:
        GuestPath.parse(text)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert refused.value.message.startswith("path: ")


@pytest.mark.parametrize("text", ["/", "/a/", "/a/.", "."])
def test_what_names_a_directory_is_no_file(text: str) -> None:
    with pytest.raises(AgentError, match="names a directory") as refused:
        GuestPath.of_file(text)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize("target", ["/outside/secret", "../outside/secret", "../../../../outside"])
def test_a_link_that_points_out_of_the_root_stays_inside(
    root: GuestRoot, directory: Path, target: str
) -> None:
    (directory / "link").symlink_to(target)
    with pytest.raises(FileNotFoundError):
        read(root, "link")


def test_an_absolute_link_is_taken_from_the_root(root: GuestRoot, directory: Path) -> None:
    (directory / "etc").mkdir()
    (directory / "etc" / "passwd").write_text("inside")
    (directory / "link").symlink_to("/etc/passwd")
    (directory / "up").symlink_to("../../etc")
    assert read(root, "link") == read(root, "up/passwd") == b"inside"


def test_a_link_of_proc_that_is_no_path_is_refused() -> None:
    with GuestRoot.opened("/") as root, pytest.raises(OSError, match="Too many levels"):
        root.open(GuestPath.parse("/proc/self/root/etc"), os.O_PATH)


def test_no_link_that_is_swapped_meanwhile_leads_out(root: GuestRoot, directory: Path) -> None:
    for name in ("outside", "real"):
        (directory / name).mkdir()
        (directory / name / "secret").write_text("mine")
    stop = threading.Event()

    def swap() -> None:
        targets = ("../outside", "real", "/../../outside", "real/../outside")
        while not stop.is_set():
            for target in targets:
                (directory / "new").symlink_to(target)
                (directory / "new").replace(directory / "link")

    (directory / "link").symlink_to("real")
    racer = threading.Thread(target=swap)
    racer.start()
    try:
        for _ in range(rounds(quick=1_000, soak=10_000)):
            assert read(root, "link/secret") == b"mine"
    finally:
        stop.set()
        racer.join()


def test_a_directory_that_is_moved_meanwhile_gives_no_way_up(
    root: GuestRoot, directory: Path
) -> None:
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "a" / "b" / "link").symlink_to("../../outside/secret")
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            (directory / "a" / "b").rename(directory / "b")
            (directory / "b").rename(directory / "a" / "b")

    racer = threading.Thread(target=move)
    racer.start()
    try:
        for _ in range(rounds(quick=1_000, soak=10_000)):
            with pytest.raises(FileNotFoundError):
                read(root, "a/b/link")
    finally:
        stop.set()
        racer.join()


def special(directory: Path) -> Iterator[tuple[str, Path]]:
    (directory / "directory").mkdir()
    yield "directory", directory / "directory"
    os.mkfifo(directory / "fifo")
    yield "fifo", directory / "fifo"
    os.mknod(directory / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    yield "character device", directory / "zero"
    os.mknod(directory / "socket", stat.S_IFSOCK | 0o666)
    yield "socket", directory / "socket"


def test_only_regular_files_are_opened_to_be_read(root: GuestRoot, directory: Path) -> None:
    for words, path in special(directory):
        with pytest.raises(OSError, match=words):
            read(root, path.name)


def test_missing_parents_are_made_with_their_owner_and_mode_whatever_the_umask(
    root: GuestRoot, directory: Path
) -> None:
    path = GuestPath.parse("/a/b/c")
    umask = os.umask(0o077)
    try:
        made_fd, made = root.make_directory(path, Owner(1000, 1001), 0o700)
    finally:
        os.umask(umask)
    os.close(made_fd)
    assert [str(each) for each in made] == ["/a", "/a/b", "/a/b/c"]
    modes = []
    for each in made:
        found = (directory / str(each).lstrip("/")).stat()
        assert (found.st_uid, found.st_gid) == (1000, 1001)
        modes.append(stat.S_IMODE(found.st_mode))
    assert modes == [0o755, 0o755, 0o700]


def test_parents_below_a_file_or_a_dangling_link_are_not_made(
    root: GuestRoot, directory: Path
) -> None:
    (directory / "file").touch()
    (directory / "link").symlink_to("/nowhere/else")
    with pytest.raises(NotADirectoryError):
        root.make_directory(GuestPath.parse("/file/a"), Owner())
    with pytest.raises(FileNotFoundError, match="/link leads nowhere"):
        root.make_directory(GuestPath.parse("/link/a"), Owner())


def test_parents_that_could_not_all_be_made_are_removed(root: GuestRoot, directory: Path) -> None:
    too_long = "x" * 300
    with pytest.raises(OSError, match="File name too long"):
        root.make_directory(GuestPath(("a", "b", too_long)), Owner())
    assert list(directory.iterdir()) == []


def test_two_that_make_the_same_parents_both_get_them(root: GuestRoot) -> None:
    for number in range(rounds(quick=100, soak=2_000)):
        path = GuestPath.parse(f"/{number}/a/b")
        failures: list[OSError] = []

        def make(path: GuestPath = path, failures: list[OSError] = failures) -> None:
            try:
                os.close(root.make_directory(path, Owner())[0])
            except OSError as error:
                failures.append(error)

        threads = [threading.Thread(target=make) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_an_owner_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(AgentError, match="uid: 4294967295") as refused:
        Owner.of(2**32 - 1, None)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
