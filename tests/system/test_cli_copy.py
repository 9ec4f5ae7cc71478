"""`innkeep cp`, both ways, with a real agent: what docker's users expect of it."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from protocol.client import AgentClient
from tests.protocol.sessions import run_innkeep
from tests.protocol.terminal import on_terminal
from tests.support import trees
from tests.support.execution import shell
from tests.support.machine import Machine
from tests.support.relay import relayed
from tests.support.standing import Persistent
from tests.support.streams import contents
from tests.support.tree import describe, differences

WHEN_NS = 1_600_000_000_123_456_789
LARGE = 40 * 1024 * 1024


@pytest.fixture
async def place(client: AgentClient) -> str:
    """A new directory in the machine, on its disk."""
    return (await shell(client, "mktemp -d /storage/copy.XXXXXX")).strip()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A local directory."""
    path = tmp_path / "here"
    path.mkdir()
    return path


def make_file(path: Path, content: bytes = b"content\n", mode: int = 0o640) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    os.utime(path, ns=(WHEN_NS, WHEN_NS))
    return path


def make_tree(path: Path) -> Path:
    """A directory with what directories have."""
    (path / "sub/empty").mkdir(parents=True)
    make_file(path / "file")
    make_file(path / "sub/größe", b"x" * 100_000, mode=0o755)
    (path / "link").symlink_to("sub/größe")
    (path / "absolute").symlink_to("/etc/passwd")
    os.link(path / "file", path / "sub/same")
    (path / "sub").chmod(0o1750)
    for directory in (path / "sub/empty", path / "sub", path):
        os.utime(directory, ns=(WHEN_NS, WHEN_NS))
    return path


def large_file(path: Path) -> Path:
    """One that takes many chunks, none like another."""
    return make_file(path, random.Random(1).randbytes(LARGE))


def files_of(directory: Path) -> set[str]:
    """The names of the files there, hidden ones too."""
    return {path.name for path in directory.iterdir() if path.is_file()}


async def cp(machine: Machine, *arguments: str | Path, **options: Any) -> None:
    """A copy that must succeed, and say nothing."""
    result = await run_innkeep(machine.address, "cp", *map(str, arguments), **options)
    assert (result.returncode, result.stderr) == (0, b"")


async def refused(machine: Machine, *arguments: str | Path, **options: Any) -> str:
    """What is said of one that must not succeed."""
    result = await run_innkeep(machine.address, "cp", *map(str, arguments), **options)
    said = result.stderr.decode()
    assert result.returncode in (1, 2)
    assert said.startswith("innkeep: ")
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return str(said)


@pytest.mark.parametrize("size", [0, 1 << 20, 3_000_000])
async def test_a_file_goes_in_and_out_with_its_mode_and_time(
    machine: Machine, place: str, here: Path, size: int
) -> None:
    file = make_file(here / "file", os.urandom(size))
    await cp(machine, file, f"vm:{place}/new")
    there = machine.path(f"{place}/new").stat()
    assert (there.st_mode & 0o7777, there.st_mtime_ns) == (0o640, WHEN_NS)
    assert (there.st_uid, there.st_gid) == (0, 0)
    await cp(machine, f"vm:{place}/new", here / "back")
    back = (here / "back").stat()
    assert (back.st_mode & 0o7777, back.st_mtime_ns) == (0o640, WHEN_NS)
    assert (here / "back").read_bytes() == file.read_bytes()
    assert files_of(here) == {"file", "back"}


async def test_what_goes_where_is_as_with_docker(
    machine: Machine, client: AgentClient, place: str, here: Path
) -> None:
    file = make_file(here / "file")
    tree = make_tree(here / "tree")
    await shell(client, f"mkdir {place}/dir")
    await cp(machine, file, f"vm:{place}/dir")
    await cp(machine, tree, f"vm:{place}/dir/")
    assert machine.path(f"{place}/dir/file").exists()
    assert machine.path(f"{place}/dir/tree/file").exists()
    await cp(machine, f"vm:{place}/dir/tree/.", here)
    assert (here / "sub/empty").is_dir()
    (here / "dir/file").mkdir(parents=True)
    assert "is a directory" in await refused(machine, f"vm:{place}/dir/file", here / "dir")
    assert "Not a directory" in await refused(machine, f"vm:{place}/dir/file/", here)
    assert "does not exist" in await refused(machine, f"vm:{place}/missing", here)
    assert "does not exist" in await refused(machine, here / "missing", f"vm:{place}")


async def test_a_tree_goes_in_and_out_as_it_is(machine: Machine, place: str, here: Path) -> None:
    tree = make_tree(here / "tree")
    await cp(machine, tree, f"vm:{place}/new")
    expected = describe(tree)
    assert differences(expected, describe(machine.path(f"{place}/new"))) == []
    await cp(machine, f"vm:{place}/new", here / "back")
    assert differences(expected, describe(here / "back")) == []


async def test_a_link_is_copied_itself_or_followed(
    machine: Machine, place: str, here: Path
) -> None:
    make_file(here / "file")
    (here / "link").symlink_to("file")
    (here / "dir").mkdir()
    (here / "to-dir").symlink_to("dir")
    await cp(machine, here / "link", f"vm:{place}/link")
    assert machine.path(f"{place}/link").readlink() == Path("file")
    await cp(machine, "-L", here / "link", f"vm:{place}/file")
    assert machine.path(f"{place}/file").read_bytes() == b"content\n"
    await cp(machine, here / "to-dir", f"vm:{place}/to-dir")
    assert machine.path(f"{place}/to-dir").is_symlink()
    await cp(machine, "-L", here / "to-dir", f"vm:{place}/dir")
    assert machine.path(f"{place}/dir").is_dir()
    await cp(machine, f"vm:{place}/link", here / "back")
    assert (here / "back").readlink() == Path("file")
    await cp(machine, "-L", f"vm:{place}/link", here / "followed")
    assert (here / "followed").read_bytes() == b"content\n"
    assert not (here / "followed").is_symlink()


async def test_owners_are_kept_when_asked_for(machine: Machine, place: str, here: Path) -> None:
    tree = make_tree(here / "tree")
    for path in (tree / "file", tree / "sub/größe"):
        os.chown(path, 1234, 567)
    (tree / "file").chmod(0o4755)
    await cp(machine, tree, f"vm:{place}/plain")
    plain = machine.path(f"{place}/plain/file").stat()
    assert (plain.st_uid, plain.st_gid, plain.st_mode & 0o7777) == (0, 0, 0o755)
    await cp(machine, "-a", tree, f"vm:{place}/kept")
    await cp(machine, "-a", tree / "file", f"vm:{place}/file")
    for name in ("kept/file", "file"):
        kept = machine.path(f"{place}/{name}").stat()
        assert (kept.st_uid, kept.st_gid, kept.st_mode & 0o7777) == (1234, 567, 0o4755)
    await cp(machine, "-a", f"vm:{place}/kept", here / "kept")
    await cp(machine, f"vm:{place}/kept", here / "plain")
    kept = (here / "kept/file").stat()
    assert (kept.st_uid, kept.st_mode & 0o7777) == (1234, 0o4755)
    assert ((here / "plain/file").stat().st_mode & 0o7777) == 0o755


async def test_a_dash_is_a_tar_stream(machine: Machine, place: str, here: Path) -> None:
    data = trees.archive(trees.numbered(3))
    await cp(machine, "-", f"vm:{place}", stdin=data)
    assert machine.path(f"{place}/layers/003").exists()
    result = await run_innkeep(machine.address, "cp", f"vm:{place}/layers", "-")
    assert (result.returncode, result.stderr) == (0, b"")
    assert contents(result.stdout) == {
        "layers": None,
        "layers/003": b"layer 3\n",
        "layers/top": b"3\n",
    }
    result = await run_innkeep(machine.address, "cp", f"vm:{place}/layers/top", "-")
    assert contents(result.stdout) == {"top": b"3\n"}
    assert "is no directory" in await refused(machine, "-", f"vm:{place}/no", stdin=data)
    said = await refused(machine, "-", f"vm:{place}", stdin=b"no tar" * 1000)
    assert "This does not look like a tar archive" in said


async def test_an_overlay_is_copied_into_and_out_of(
    machine: Machine, persistent: Persistent, here: Path
) -> None:
    await persistent.shell("mkdir /data; ln -s /data /absolute")
    tree = make_tree(here / "tree")
    options = ("--overlay", persistent.id)
    await cp(machine, *options, tree, "vm:/absolute")
    assert await persistent.shell("cat /data/tree/file") == "content\n"
    await cp(machine, *options, "vm:/data/tree/file", here / "back")
    assert (here / "back").read_bytes() == b"content\n"


async def test_an_upload_that_was_cut_goes_on_where_it_was(
    machine: Machine, place: str, here: Path
) -> None:
    file = large_file(here / "large")
    async with relayed(here, machine.address, most_bytes=LARGE) as relay:
        result = await run_innkeep(relay.address, "cp", str(file), f"vm:{place}/large")
    assert result.returncode == 1
    assert not machine.path(f"{place}/large").exists()
    async with relayed(here, machine.address) as relay:
        result = await run_innkeep(relay.address, "cp", str(file), f"vm:{place}/large")
        assert (result.returncode, result.stderr) == (0, b"")
        assert relay.to_agent_bytes < LARGE // 2
    assert machine.path(f"{place}/large").read_bytes() == file.read_bytes()
    assert files_of(machine.path(place)) == {"large"}


async def test_a_download_that_was_cut_goes_on_where_it_was(
    machine: Machine, place: str, here: Path
) -> None:
    file = large_file(machine.path(f"{place}/large"))
    target = here / "large"
    async with relayed(here, machine.address, most_bytes=LARGE) as relay:
        result = await run_innkeep(relay.address, "cp", f"vm:{place}/large", str(target))
    assert result.returncode == 1
    assert not target.exists()
    (partial,) = files_of(here)
    assert partial.startswith(".innkeep-part-")
    assert (here / partial).stat().st_mode & 0o777 == 0o600
    async with relayed(here, machine.address) as relay:
        result = await run_innkeep(relay.address, "cp", f"vm:{place}/large", str(target))
        assert (result.returncode, result.stderr) == (0, b"")
        assert relay.from_agent_bytes < LARGE
    assert target.read_bytes() == file.read_bytes()
    assert files_of(here) == {"large"}


async def test_what_somebody_else_has_put_there_is_not_gone_on_with(
    machine: Machine, place: str, here: Path
) -> None:
    file = large_file(machine.path(f"{place}/large"))
    target = here / "large"
    async with relayed(here, machine.address, most_bytes=LARGE) as relay:
        await run_innkeep(relay.address, "cp", f"vm:{place}/large", str(target))
    (partial,) = files_of(here)
    (here / partial).write_bytes(b"not what was sent" * 2_000_000)
    os.chown(here / partial, 1234, 567)
    await cp(machine, f"vm:{place}/large", target)
    assert target.read_bytes() == file.read_bytes()
    assert target.stat().st_uid == 0


async def test_a_file_that_has_changed_is_downloaded_anew(
    machine: Machine, place: str, here: Path
) -> None:
    large_file(machine.path(f"{place}/large"))
    target = here / "large"
    async with relayed(here, machine.address, most_bytes=LARGE) as relay:
        await run_innkeep(relay.address, "cp", f"vm:{place}/large", str(target))
    machine.path(f"{place}/large").write_bytes(b"another")
    await cp(machine, f"vm:{place}/large", target)
    assert target.read_bytes() == b"another"
    assert files_of(here) == {"large"}


async def test_the_user_interrupts_and_goes_on(machine: Machine, place: str, here: Path) -> None:
    file = large_file(machine.path(f"{place}/large"))
    async with on_terminal(machine.address, "cp", f"vm:{place}/large", str(here)) as terminal:
        await terminal.see(r"large .*MB")
        terminal.process.send_signal(signal.SIGINT)
        # By the signal itself where all was done already: 130 to a shell, too.
        assert await terminal.exit_code() in (0, 130, -signal.SIGINT)
    await cp(machine, f"vm:{place}/large", here)
    assert (here / "large").read_bytes() == file.read_bytes()
    assert files_of(here) == {"large"}


async def test_a_terminal_shows_a_bar_that_goes_away_and_a_pipe_does_not(
    machine: Machine, place: str, here: Path
) -> None:
    file = large_file(here / "large")
    async with on_terminal(machine.address, "cp", str(file), f"vm:{place}/large") as terminal:
        assert b"large" in await terminal.see(r"/41\.9 MB")
        assert await terminal.exit_code() == 0
        # The line is erased at the end.
        assert (await terminal.rest()).rstrip().endswith(b"\x1b[2K")
    async with on_terminal(machine.address, "cp", "-q", str(file), f"vm:{place}/two") as terminal:
        assert await terminal.exit_code() == 0
        assert await terminal.rest() == b""
    await cp(machine, file, f"vm:{place}/three")


async def test_what_the_agent_has_against_it_is_told_in_a_line(
    machine: Machine, client: AgentClient, place: str, here: Path
) -> None:
    made = ("mkdir -p full/file/below", "mknod null c 1 3", "mkfifo fifo", r"ln -s $'\xff' link")
    await shell(client, f"cd {place} && {' && '.join(made)}")
    (here / "tree").mkdir()
    make_file(here / "tree/file")
    said = await refused(machine, f"{here}/tree/.", f"vm:{place}/full")
    assert "file: Cannot open" in said
    for name, words in (
        ("null", "a character device"),
        ("fifo", "a fifo"),
        ("link", "a link whose target is not UTF-8"),
    ):
        said = await refused(machine, f"vm:{place}/{name}", here / "x")
        assert f"{name} is {words}, which is not copied" in said
    os.mkfifo(here / "pipe")
    said = await refused(machine, here / "pipe", f"vm:{place}/x")
    assert "is a device, fifo or socket, which is not copied" in said
    assert "'..'" in await refused(machine, "vm:/tmp/../etc", here)
    assert "no-such" in await refused(machine, "--overlay", "no-such", "vm:/etc", here)


async def test_devices_are_left_out_and_told(
    machine: Machine, client: AgentClient, place: str, here: Path
) -> None:
    await shell(client, f"cd {place}; mkdir d; mknod d/null c 1 3; mkfifo d/fifo; echo x >d/file")
    result = await run_innkeep(machine.address, "cp", f"vm:{place}/d", str(here))
    assert result.returncode == 1
    assert b"null: not copied: it is a device" in result.stderr
    assert (here / "d/file").read_text() == "x\n"
    assert (here / "d/fifo").is_fifo()
