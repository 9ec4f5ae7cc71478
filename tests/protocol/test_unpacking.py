"""Tar streams from a machine that may be hostile, unpacked where its host has its own files."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.cli.archive import Source
from protocol.cli.unpacking import Unpacking, UnsafeEntry
from tests.support.streams import Entry, directory, entry, hard_link, stream, symlink
from tests.support.tree import describe, differences


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside where things are unpacked, with a file that nobody is to touch."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "canary").write_text("alive")
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


def unpack(here: Path, data: bytes, *, with_owners: bool = False) -> list[str]:
    """Unpack a stream; what was remarked."""
    remarks: list[str] = []
    Unpacking(here, with_owners=with_owners, remark=remarks.append).unpack(io.BytesIO(data))
    return remarks


HOSTILE: dict[str, Callable[[Path], list[Entry]]] = {
    "dots": lambda out: [entry("../outside/canary", b"dead")],
    "hidden dots": lambda out: [entry("a/../../outside/canary", b"dead")],
    "an absolute name": lambda out: [entry(f"{out}/canary", b"dead")],
    "through a symlink": lambda out: [symlink("a", "../outside"), entry("a/canary", b"dead")],
    "through an absolute symlink": lambda out: [symlink("a", str(out)), entry("a/canary", b"dead")],
    "below a symlink": lambda out: [symlink("a", ".."), entry("a/outside/canary", b"dead")],
    "a directory through a symlink": lambda out: [symlink("a", str(out)), directory("a/new")],
    "a symlink through a symlink": lambda out: [symlink("a", str(out)), symlink("a/new", "x")],
    "a hard link": lambda out: [hard_link("a", "../outside/canary"), entry("a", b"dead")],
    "an absolute hard link": lambda out: [hard_link("a", f"{out}/canary")],
    "a hard link through a symlink": lambda out: [
        symlink("a", str(out)),
        hard_link("b", "a/canary"),
    ],
    "through a symlink that was there": lambda out: [entry("there/canary", b"dead")],
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_is_written_outside(here: Path, outside: Path, hostile: str) -> None:
    here.mkdir()
    (here / "there").symlink_to(outside)
    before = describe(outside)
    with pytest.raises(UnsafeEntry):
        unpack(here, stream(HOSTILE[hostile](outside)))
    assert differences(before, describe(outside)) == []
    assert (outside / "canary").stat().st_nlink == 1


def test_a_link_is_replaced_and_not_written_through(here: Path, outside: Path) -> None:
    entries = [
        symlink("a", "../outside/canary"),
        entry("a", b"dead"),
        symlink("d", str(outside)),
        directory("d", mode=0),
    ]
    unpack(here, stream(entries))
    assert (outside / "canary").read_text() == "alive"
    assert outside.stat().st_mode & 0o777
    assert (here / "a").read_bytes() == b"dead"


def test_links_that_lead_out_are_only_links(here: Path) -> None:
    unpack(here, stream([symlink("a", "/etc/passwd"), symlink("b", "../../x")]))
    assert (here / "a").readlink() == Path("/etc/passwd")
    assert (here / "b").readlink() == Path("../../x")


def test_devices_are_left_out_and_told(here: Path) -> None:
    devices = [entry(name, type=kind, devmajor=1) for name, kind in (("c", b"3"), ("b", b"4"))]
    remarks = unpack(here, stream([*devices, entry("file", b"x")]))
    assert remarks == ["c: not copied: it is a device", "b: not copied: it is a device"]
    assert {path.name for path in here.iterdir()} == {"file"}


def test_privileges_come_with_owners_only(here: Path, tmp_path: Path) -> None:
    data = stream([entry("f", b"x", mode=0o6755, uid=12, gid=34)])
    unpack(here, data)
    status = (here / "f").stat()
    assert (status.st_mode & 0o7777, status.st_uid) == (0o755, os.getuid())
    unpack(tmp_path / "kept", data, with_owners=True)
    status = (tmp_path / "kept/f").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o6755, 12, 34)


def test_a_directory_that_may_not_be_written_is_filled_all_the_same(here: Path) -> None:
    unpack(here, stream([directory("d", mode=0o555), entry("d/f", b"x", mode=0o400)]))
    assert (here / "d/f").read_bytes() == b"x"
    assert (here / "d").stat().st_mode & 0o777 == 0o555
    assert (here / "d").stat().st_mtime == 1_600_000_000


@pytest.mark.parametrize("cut", [100, 700])
def test_a_stream_that_is_cut_short_is_an_error(here: Path, cut: int) -> None:
    data = stream([entry("first", b"x" * 600), entry("second", b"y" * 600)])
    with pytest.raises(tarfile.TarError):
        unpack(here, data[:cut])


def test_what_was_packed_here_is_what_is_unpacked(here: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/größe").write_bytes(b"x" * 70_000)
    (tree / "sub" / os.fsdecode(b"latin-\xe9")).write_text("e9")
    (tree / ("n" * 200)).write_text("long")
    os.link(tree / "sub/größe", tree / "same")
    (tree / "link").symlink_to("nowhere")
    os.mkfifo(tree / "fifo")
    for path in (*tree.rglob("*"), tree):
        os.utime(path, ns=(1, 1_600_000_000_123_456_789), follow_symlinks=False)
    buffer = io.BytesIO()
    source = Source(tree, ".", with_owners=True)
    source.write(buffer)
    assert len(buffer.getvalue()) <= source.total_bytes() + 20_480
    unpack(here, buffer.getvalue(), with_owners=True)
    assert differences(describe(tree), describe(here)) == []


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5_000_000)

    class Shortening(io.BytesIO):
        def write(self, data: object) -> int:
            os.truncate(tmp_path / "file", 10)
            return super().write(data)  # type: ignore[arg-type]

    with pytest.raises(OSError, match="became shorter") as raised:
        Source(tmp_path / "file", "file").write(Shortening())
    assert raised.value.filename == str(tmp_path / "file")
