"""What requests may have mounted, and where."""

from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.processes.command import Bind
from agent.processes.shares import Shares
from protocol.errors import ErrorCode
from protocol.values import Mount


@pytest.fixture
def shares(tmp_path: Path) -> Shares:
    return Shares(tmp_path / "virtiofs")


def refusal(shares: Shares, *mounts: Mount) -> str:
    with pytest.raises(AgentError) as raised:
        shares.binds(mounts)
    assert raised.value.code is ErrorCode.MOUNT_FAILED
    return raised.value.message


def test_an_absolute_path_is_a_directory_of_the_machine(shares: Shares, tmp_path: Path) -> None:
    for read_only in (False, True):
        mount = Mount(str(tmp_path), "/data", read_only)
        assert shares.binds([mount]) == [Bind(str(tmp_path), "/data", read_only)]


@pytest.mark.parametrize(
    ("spelling", "destination"),
    [("/a", "/a"), ("/a/", "/a"), ("//a", "/a"), ("/a//b/./c/", "/a/b/c"), ("/a b\n", "/a b\n")],
)
def test_a_path_means_the_same_however_it_is_spelled(
    shares: Shares, tmp_path: Path, spelling: str, destination: str
) -> None:
    (bind,) = shares.binds([Mount(str(tmp_path), spelling, False)])
    assert bind.destination == destination


@pytest.mark.parametrize(
    "path", ["", "a", "./a", "/", "//", "/.", "/..", "/a/../b", "/a/..", "/\0"]
)
def test_a_path_that_cannot_be_one_is_refused(shares: Shares, tmp_path: Path, path: str) -> None:
    message = refusal(shares, Mount(str(tmp_path), path, False))
    assert message.endswith("expected an absolute path in the container, without ..")
    assert repr(path) in message


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "a\0b"])
def test_what_is_neither_a_tag_nor_a_path_is_refused(shares: Shares, tag: str) -> None:
    message = refusal(shares, Mount(tag, "/data", False))
    assert "expected a virtiofs tag or an absolute path" in message
    assert not shares.directory.exists()


def test_a_source_that_is_no_directory_is_refused(shares: Shares, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(shares, Mount(f"{tmp_path}/file", "/data", False))
    assert "No such file" in refusal(shares, Mount(f"{tmp_path}/absent", "/data", False))
    assert "No such file" in refusal(shares, Mount(f"{tmp_path}/a\0b", "/data", False))


def test_a_share_that_the_machine_has_not_is_refused_and_leaves_nothing(shares: Shares) -> None:
    message = refusal(shares, Mount("code", "/data", False))
    assert message.startswith("mount 'code' at '/data': the VM has no virtiofs share of that tag;")
    assert "absolute path" in message
    assert list(shares.directory.iterdir()) == []


def test_a_tag_longer_than_any_name_is_refused_in_a_short_message(shares: Shares) -> None:
    message = refusal(shares, Mount("x" * 100_000, "/data", False))
    assert "File name too long" in message
    assert len(message) < 1000


def test_outer_directories_come_before_those_within_them(shares: Shares, tmp_path: Path) -> None:
    paths = ["/a/b/c", "/z", "/a", "/a/b", "/b"]
    binds = shares.binds([Mount(str(tmp_path), path, False) for path in paths])
    assert [bind.destination for bind in binds] == ["/z", "/a", "/b", "/a/b", "/a/b/c"]


def test_two_mounts_at_one_path_are_refused_unless_they_are_one(
    shares: Shares, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    mount = Mount(str(tmp_path), "/data", False)
    assert shares.binds([mount, Mount(str(tmp_path), "/data/", False)]) == [
        Bind(str(tmp_path), "/data")
    ]
    for other in (Mount(str(tmp_path), "/data", True), Mount(f"{tmp_path}/other", "/data", False)):
        message = refusal(shares, mount, other)
        assert "another mount of the request has that path" in message
