"""Reading files block by block."""

import hashlib
import os
from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.files.download import BLOCK_BYTES, Download
from agent.files.guest_path import GuestPath, GuestRoot
from agent.files.temporary import Site
from protocol.errors import ErrorCode

DATA = os.urandom(2 * BLOCK_BYTES + 1234)


def read(site: Site, path: str = "/file", **fields: int) -> bytes:
    blocks = []
    with Download.opened(site.root, GuestPath.parse(path), **fields) as download:
        while block := download.read():
            assert len(block) <= BLOCK_BYTES
            blocks.append(block)
    assert download.size == sum(map(len, blocks))
    return b"".join(blocks)


def test_a_file_comes_whole_in_blocks_of_a_mebibyte(site: Site, directory: Path) -> None:
    (directory / "file").write_bytes(DATA)
    assert read(site) == DATA


@pytest.mark.parametrize("offset", [0, 1, BLOCK_BYTES, len(DATA) - 1, len(DATA), 2**63, 2**64 - 1])
@pytest.mark.parametrize("length", [None, 0, 1, BLOCK_BYTES + 1, 2**64 - 1])
def test_a_part_is_that_part(site: Site, directory: Path, offset: int, length: int | None) -> None:
    (directory / "file").write_bytes(DATA)
    fields = {"offset": offset} if length is None else {"offset": offset, "length": length}
    assert read(site, **fields) == DATA[offset:][:length]


def test_the_digest_is_that_of_what_was_read(site: Site, directory: Path) -> None:
    (directory / "file").write_bytes(DATA)
    path = GuestPath.parse("/file")
    with Download.opened(site.root, path, offset=10, length=100, digest=True) as download:
        while download.read():
            pass
    assert download.sha256 == hashlib.sha256(DATA[10:110]).hexdigest()
    assert download.size == 100


def test_a_file_that_shrinks_or_grows_while_it_is_read_gives_what_was_read(
    site: Site, directory: Path
) -> None:
    file = directory / "file"
    file.write_bytes(DATA)
    with Download.opened(site.root, GuestPath.parse("/file")) as download:
        assert download.read() == DATA[:BLOCK_BYTES]
        os.truncate(file, 10)
        assert download.read() == b""
    file.write_bytes(DATA[:BLOCK_BYTES])
    with Download.opened(site.root, GuestPath.parse("/file")) as download:
        assert download.read() == DATA[:BLOCK_BYTES]
        file.write_bytes(DATA[: BLOCK_BYTES + 7])
        assert download.read() == DATA[BLOCK_BYTES : BLOCK_BYTES + 7]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nothing", "No such file or directory"),
        ("/file/below", "Not a directory"),
        ("/directory", "Is a directory"),
        ("/fifo", "it is a fifo, no regular file"),
        ("/loop", "too many symbolic links, or one of /proc that is no path"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_path(
    site: Site, directory: Path, path: str, words: str
) -> None:
    (directory / "file").touch()
    (directory / "directory").mkdir()
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "fifo")
    with pytest.raises(AgentError) as refusal:
        read(site, path)
    assert refusal.value.code is ErrorCode.FILE_IO_FAILED
    assert refusal.value.message == f"read {path}: {words}"


def test_files_of_proc_that_have_no_size_are_read_to_their_end() -> None:
    with GuestRoot.opened("/") as root:
        path = GuestPath.parse("/proc/self/mountinfo")
        with Download.opened(root, path) as download:
            assert download.read() == Path("/proc/self/mountinfo").read_bytes()
            assert download.read() == b""
