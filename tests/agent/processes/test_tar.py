"""Directories as tar streams: what is kept, what is refused, and that nothing leads out."""

import itertools
import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.errors import AgentError
from agent.linux.mount import MS_BIND, MS_RDONLY, MS_REMOUNT, mount, umount2
from agent.processes import tar
from agent.processes.service import Processes
from protocol.errors import ErrorCode
from tests.support import trees
from tests.support.commands import run
from tests.support.process_tree import children
from tests.support.rounds import rounds
from tests.support.streams import (
    BLOCK,
    END_MARK,
    Entry,
    contents,
    directory,
    entry,
    hard_link,
    stream,
    symlink,
)
from tests.support.tree import describe, differences

CHUNK = 64 * 1024


@pytest.fixture
def others() -> set[int]:
    """Children that were there before: a registry, perhaps, that all tests share."""
    return set(children(os.getpid()))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty directory to unpack into."""
    path = tmp_path / "target"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside it, with a file that nobody is to read or touch."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "canary").write_text("alive")
    return path


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def mounted(path: Path, fstype: str, data: str) -> Iterator[None]:
    mount(fstype, path, fstype=fstype, data=data)
    try:
        yield
    finally:
        umount2(path)


def proc_file(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def stop(pid: int) -> None:
    """Stop a child, and wait until it is."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def find_library() -> Path:
    """Some shared library of this machine."""
    return next(Path("/lib").glob("*-linux-gnu/libm.so.6")).resolve()


async def unpack(
    processes: Processes, target: Path, data: bytes, owner: tuple[int, int] | None = None
) -> tuple[str, ...]:
    """Unpack a whole stream, in chunks; what tar had to remark."""
    with opened(target) as descriptor:
        async with tar.unpacking(processes, descriptor, owner=owner) as unpacking:
            for start in range(0, len(data), CHUNK):
                await unpacking.feed(data[start : start + CHUNK])
            return await unpacking.finish()


async def pack(
    processes: Processes, source: Path, *, name: str = ".", called: str | None = None
) -> bytes:
    """The stream of a directory."""
    packed = bytearray()

    async def keep(data: bytes) -> None:
        packed.extend(data)

    with opened(source) as descriptor:
        assert await tar.pack(processes, descriptor, keep, name=name, called=called) == ()
    return bytes(packed)


async def refusal(work: Callable[[], Awaitable[object]]) -> AgentError:
    """The error that this ends in, and nothing beside it."""
    with pytest.raises((AgentError, ExceptionGroup)) as raised:
        await work()
    error: BaseException = raised.value
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, AgentError)
    assert error.code is ErrorCode.FILE_IO_FAILED
    return error


def odd(root: Path) -> None:
    """Everything odd that may be in a stream: no devices, and no attributes of root alone."""
    trees.odd_entries(root)
    (root / "special/null").unlink()
    (root / "special/disk").unlink()
    os.removexattr(root / "attributes/trusted", "trusted.innkeep")


@pytest.mark.parametrize("build", [odd, trees.sparse_files])
async def test_all_of_a_tree_is_kept_both_ways(
    processes: Processes, target: Path, tmp_path: Path, build: trees.Builder
) -> None:
    expected = tmp_path / "expected"
    expected.mkdir()
    data = trees.archive(build, "--sparse")
    options = ("--xattrs", "--xattrs-include=*", "--numeric-owner")
    run("tar", "--extract", "--same-permissions", *options, "-C", expected, stdin=data)
    assert await unpack(processes, target, data) == ()
    assert differences(describe(expected), describe(target)) == []
    again = tmp_path / "again"
    again.mkdir()
    await unpack(processes, again, await pack(processes, target))
    assert differences(describe(expected), describe(again)) == []


async def test_old_formats_are_read_as_well(processes: Processes, target: Path) -> None:
    await unpack(processes, target, trees.archive(trees.numbered(7), gnu=True))
    assert (target / "layers/007").read_text() == "layer 7\n"


@pytest.mark.parametrize("called", ["etc", "a&b\\1,c[d].*", "größe", "new\nline"])
async def test_the_top_of_a_stream_can_have_a_name(
    processes: Processes, target: Path, called: str
) -> None:
    (target / "hidden").write_text("x")
    os.link(target / "hidden", target / "linked")
    (target / "link").symlink_to("./hidden")
    data = await pack(processes, target, called=called)
    assert set(contents(data)) == {called, *(f"{called}/{n}" for n in ("hidden", "linked", "link"))}
    await unpack(processes, target, data)
    assert (target / called / "hidden").samefile(target / called / "linked")
    assert (target / called / "link").readlink() == Path("./hidden")


@pytest.mark.parametrize("name", ["-rf *", "--help", "a^b[.]*$,\\1&c", "größe-🐢", "new\nline"])
async def test_one_file_can_be_packed_under_its_own_name_or_another(
    processes: Processes, target: Path, name: str
) -> None:
    (target / name).write_text("x")
    (target / "other").write_text("y")
    assert contents(await pack(processes, target, name=name)) == {name: b"x"}
    assert contents(await pack(processes, target, name=name, called="new")) == {"new": b"x"}


async def test_what_is_made_can_be_given_to_one_owner(processes: Processes, target: Path) -> None:
    (target / "old").mkdir()
    entries = [
        directory("old"),
        directory("new", mode=0o700),
        entry("new/file", b"x", uid=5, gid=6, mode=0o4755),
        symlink("new/link", "file"),
    ]
    await unpack(processes, target, stream(entries), owner=(1234, 567))
    for name in ("new", "new/file", "new/link"):
        status = (target / name).lstat()
        assert (status.st_uid, status.st_gid) == (1234, 567)
    assert (target / "old").stat().st_uid == 0
    assert (target / "new/file").stat().st_mode & 0o7777 == 0o4755


async def test_a_file_replaces_what_has_its_name(processes: Processes, target: Path) -> None:
    (target / "file").write_text("old")
    os.link(target / "file", target / "same")
    (target / "link").symlink_to("same")
    await unpack(processes, target, stream([entry("file", b"new"), entry("link", b"new")]))
    assert (target / "file").read_bytes() == b"new"
    assert not (target / "link").is_symlink()
    assert (target / "same").read_text() == "old"


async def test_a_directory_is_merged_into_what_is_there_and_a_link_to_one_is_kept(
    processes: Processes, target: Path
) -> None:
    (target / "usr/lib").mkdir(parents=True)
    (target / "usr/lib/old").write_text("old")
    (target / "lib").symlink_to("usr/lib")
    (target / "absolute").symlink_to("/usr/lib")
    entries = [directory("lib"), entry("lib/new", b"new"), entry("absolute/newer", b"newer")]
    await unpack(processes, target, stream(entries))
    assert (target / "lib").is_symlink()
    names = {path.name for path in (target / "usr/lib").iterdir()}
    assert names == {"old", "new", "newer"}


HOSTILE: dict[str, Callable[[Path], list[Entry]]] = {
    "dots": lambda out: [entry("../outside/canary", b"dead")],
    "more dots": lambda out: [entry("a/../../../../../outside/canary", b"dead")],
    "dots to a directory": lambda out: [directory("../outside"), entry("../outside/x", b"dead")],
    "an absolute name": lambda out: [entry(f"{out}/canary", b"dead")],
    "through a symlink": lambda out: [symlink("a", "../outside"), entry("a/canary", b"dead")],
    "through an absolute symlink": lambda out: [symlink("a", str(out)), entry("a/canary", b"dead")],
    "through a chain of symlinks": lambda out: [
        directory("b"),
        symlink("b/up", ".."),
        symlink("a", "b/up/../outside"),
        entry("a/canary", b"dead"),
    ],
    "a directory of a symlink": lambda out: [
        symlink("a", "../outside"),
        directory("a", mode=0),
        entry("a/canary", b"dead"),
    ],
    "a hard link": lambda out: [hard_link("a", "../outside/canary"), entry("a", b"dead")],
    "an absolute hard link": lambda out: [hard_link("a", f"{out}/canary")],
    "a hard link through a symlink": lambda out: [
        symlink("a", str(out)),
        hard_link("b", "a/canary"),
    ],
    "through a symlink on the disk": lambda out: [entry("disk/canary", b"dead")],
    "a directory of a symlink on the disk": lambda out: [directory("disk", mode=0)],
    "through an absolute symlink on the disk": lambda out: [entry("absolute/canary", b"dead")],
    "a hard link through the disk": lambda out: [hard_link("a", "absolute/canary")],
}


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_no_stream_writes_outside_its_directory(
    processes: Processes, target: Path, outside: Path, hostile: str
) -> None:
    (target / "disk").symlink_to("../outside")
    (target / "absolute").symlink_to(outside)
    before = describe(outside)
    # Some are refused, others mean something harmless in there.
    with suppress(AgentError, ExceptionGroup):
        await unpack(processes, target, stream(HOSTILE[hostile](outside)))
    assert differences(before, describe(outside)) == []
    assert (outside / "canary").stat().st_nlink == 1
    assert {path.name for path in target.parent.iterdir()} >= {"target", "outside"}


async def test_absolute_names_are_names_in_the_directory(
    processes: Processes, target: Path
) -> None:
    entries = [
        entry("/etc/x", b"1"),
        entry("/../y", b"2"),
        hard_link("/z", "/etc/x"),
        symlink("/l", "/etc"),
    ]
    await unpack(processes, target, stream([directory("/etc"), *entries]))
    assert (target / "etc/x").read_bytes() == b"1"
    assert (target / "y").read_bytes() == b"2"
    assert (target / "z").stat().st_ino == (target / "etc/x").stat().st_ino
    assert (target / "l").readlink() == Path("/etc")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE])
async def test_device_nodes_are_refused(processes: Processes, target: Path, kind: bytes) -> None:
    device = entry("disk", type=kind, devmajor=254, devminor=0, mode=0o666)
    error = await refusal(lambda: unpack(processes, target, stream([device, entry("file", b"x")])))
    assert "disk: Cannot mknod: Operation not permitted" in error.message
    assert not (target / "disk").exists()
    assert (target / "file").read_bytes() == b"x"


async def test_nothing_in_the_directory_is_executed(
    processes: Processes, target: Path, tmp_path: Path, others: set[int]
) -> None:
    """What a loader looks for in its root, and libraries of names and character sets."""
    (target / "etc").mkdir()
    shutil.copy(find_library(), target / "evil.so")
    (target / "evil.so").chmod(0o755)
    (target / "etc/ld.so.preload").write_text("/evil.so\n")
    (target / "etc/nsswitch.conf").write_text("passwd: evil\ngroup: evil\n")
    data = stream([entry("größe", b"x", uname="root", gname="root")])
    with opened(target) as descriptor:
        async with tar.unpacking(processes, descriptor) as unpacking:
            await unpacking.feed(data[:-BLOCK])
            (pid,) = set(children(os.getpid())) - others
            mapped = [line.split() for line in proc_file(pid, "maps").splitlines()]
            assert {words[1] for words in mapped if words[-1] == "/evil.so"} <= {"r--p"}
            status = proc_file(pid, "status")
            await unpacking.feed(data[-BLOCK:])
            assert await unpacking.finish() == ()
    assert (target / "größe").exists()
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETFCAP, and nothing else of root's.
    assert "CapPrm:\t000000008000001b\n" in status
    assert "CapEff:\t000000008000001b\n" in status


async def test_a_directory_that_is_swapped_for_a_link_leads_nowhere(
    processes: Processes, target: Path, outside: Path
) -> None:
    """Somebody changes the tree while tar walks it, both ways."""
    (target / "real").mkdir()
    for number in range(50):
        (target / "real" / f"{number}").write_text("mine")
    (target / "link").symlink_to("../outside")
    (target / "absolute").symlink_to(outside)
    entries = [entry(f"swapped/{number}", b"new") for number in range(200)]
    data = stream([*entries, entry("swapped/canary", b"dead")])
    before = describe(outside)
    over = threading.Event()

    def swap() -> None:
        names = [target / name for name in ("real", "link", "absolute")]
        place = target / "swapped"
        made = itertools.count()
        while not over.is_set():
            for name in names:
                # Where tar has made a directory of its own, that is put aside.
                with suppress(OSError):
                    name.rename(place)
                place.rename(
                    name
                    if not name.is_symlink() and not name.exists()
                    else target / f"made-{next(made)}"
                )

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(rounds(quick=10, soak=500)):
            with suppress(AgentError, ExceptionGroup):
                await unpack(processes, target, data)
            packed = bytearray()

            async def keep(data: bytes, into: bytearray = packed) -> None:
                into.extend(data)

            with opened(target) as descriptor, suppress(AgentError, ExceptionGroup):
                await tar.pack(processes, descriptor, keep)
            assert b"alive" not in packed
    finally:
        over.set()
        swapper.join()
    assert differences(before, describe(outside)) == []


WHOLE = stream([entry("first", b"1" * 3000), directory("a"), entry("a/last", b"2" * 3000)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "This does not look like a tar archive"),
        (WHOLE[:BLOCK], "Unexpected EOF in archive"),
        (WHOLE[: 3 * BLOCK], "Unexpected EOF in archive"),
        # After a whole entry, where tar itself sees nothing wrong.
        (WHOLE[: 7 * BLOCK], "no end mark after 3584 bytes"),
        (b"no archive" * 1000, "This does not look like a tar archive"),
        (b"\x1f\x8b\x08" + bytes(2000), "compressed"),
    ],
)
async def test_what_is_no_whole_stream_is_an_error_in_tars_words(
    processes: Processes, target: Path, data: bytes, words: str
) -> None:
    error = await refusal(lambda: unpack(processes, target, data))
    assert words in error.message
    assert "\n" not in error.message


async def test_failures_beyond_the_first_few_are_counted(
    processes: Processes, target: Path
) -> None:
    for number in range(20):
        (target / f"{number}").mkdir()
        (target / f"{number}/full").touch()
    data = stream([entry(f"{number}", b"") for number in range(20)])
    error = await refusal(lambda: unpack(processes, target, data))
    assert "0: Cannot open" in error.message
    assert "and 17 lines more" in error.message


async def test_a_full_disk_ends_it_at_once(processes: Processes, target: Path) -> None:
    data = stream([entry(f"{number}", os.urandom(300_000)) for number in range(100)])
    with mounted(target, "tmpfs", "size=1M"):
        error = await refusal(lambda: unpack(processes, target, data))
        assert "No space left on device" in error.message
        # Not one file for each entry that was still to come.
        assert len(describe(target)) < 60


async def test_a_read_only_file_system_is_told(processes: Processes, target: Path) -> None:
    mount(target, target, flags=MS_BIND)
    try:
        mount(None, target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
        error = await refusal(lambda: unpack(processes, target, WHOLE))
        assert "Read-only file system" in error.message
        assert contents(await pack(processes, target)) == {".": None}
    finally:
        umount2(target)


async def test_mounts_below_are_written_to_and_not_read(processes: Processes, target: Path) -> None:
    (target / "mounted").mkdir()
    (target / "mounted/below").write_text("under the mount")
    with mounted(target / "mounted", "tmpfs", "size=1M"):
        await unpack(processes, target, stream([entry("mounted/new", b"new")]))
        assert (target / "mounted/new").read_bytes() == b"new"
        assert "./mounted/new" not in contents(await pack(processes, target))
    assert {path.name for path in (target / "mounted").iterdir()} == {"below"}


async def test_a_tar_that_does_not_get_on_holds_its_sender_up(
    processes: Processes, target: Path, others: set[int]
) -> None:
    data = stream([entry("file", bytes(16 << 20))])
    fed = 0
    with opened(target) as descriptor:
        async with (
            tar.unpacking(processes, descriptor) as unpacking,
            trio.open_nursery() as nursery,
        ):
            (pid,) = set(children(os.getpid())) - others
            stop(pid)

            async def feed() -> None:
                nonlocal fed
                for start in range(0, len(data), CHUNK):
                    await unpacking.feed(data[start : start + CHUNK])
                    fed += CHUNK

            nursery.start_soon(feed)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert fed <= 1 << 20
            os.kill(pid, signal.SIGCONT)
        assert fed >= len(data)


async def test_nothing_is_left_of_a_tar_whose_host_goes(
    processes: Processes, target: Path, cgroup_root: Path, others: set[int]
) -> None:
    mounts = proc_file(os.getpid(), "mountinfo")
    for cut in range(0, len(WHOLE), 997):
        with trio.CancelScope() as host, opened(target) as descriptor:
            async with tar.unpacking(processes, descriptor) as unpacking:
                await unpacking.feed(WHOLE[:cut])
                host.cancel()
                await trio.lowlevel.checkpoint()
    (target / "large").write_bytes(bytes(8 << 20))
    with trio.CancelScope() as host, opened(target) as descriptor:

        async def leave(data: bytes) -> None:
            host.cancel()
            await trio.lowlevel.checkpoint()

        await tar.pack(processes, descriptor, leave)
    assert set(children(os.getpid())) <= others
    assert [path for path in (cgroup_root / "workloads/commands").iterdir() if path.is_dir()] == []
    assert proc_file(os.getpid(), "mountinfo") == mounts


async def test_the_end_mark_may_come_alone(processes: Processes, target: Path) -> None:
    assert await unpack(processes, target, END_MARK) == ()
    assert set(describe(target)) == {"."}
