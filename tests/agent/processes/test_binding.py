"""What is bound into a container that runs: made by crun, with a process that only waits."""

import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from agent.errors import AgentError
from agent.processes.binding import bind_into
from agent.processes.cgroup import Cgroup
from agent.processes.command import Bind, ContainerCommand
from agent.processes.container import ContainerRuntime
from protocol.errors import ErrorCode
from tests.support.image_info import image_info

PATIENCE_S = 30

IMAGE = image_info(env=("PATH=/bin",))


@pytest.fixture
async def container(runtime: ContainerRuntime, rootfs: Path) -> AsyncIterator[int]:
    """The first process of a container."""
    command = ContainerCommand.from_request("test", IMAGE, ("sleep", "1000"))
    directory = runtime.directory / "bound"
    cgroup = Cgroup.make(runtime.cgroups(privileged=False), "bound")
    with trio.fail_after(PATIENCE_S):
        pid = await runtime.start(command, rootfs, directory, cgroup.path, logged=False)
    yield pid
    cgroup.kill()
    await runtime.processes.seen_off(cgroup.path)
    await cgroup.removed()
    runtime.forget(directory)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    (directory / "file").write_text("shared\n")
    return directory


def inside(pid: int, path: str) -> Path:
    """A file of the container, for paths without links."""
    return Path(f"/proc/{pid}/root{path}")


def mounts_of(pid: int) -> dict[str, str]:
    """The mounts of a process, by where they are, with their options."""
    return dict(mount_points_of(pid))


def mount_points_of(pid: int) -> list[tuple[str, str]]:
    """As they are mounted, one above the other."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [(line.split()[4], line.split()[5]) for line in lines]


def refusal(pid: int, bind: Bind) -> str:
    with pytest.raises(AgentError) as raised:
        bind_into(pid, bind)
    assert raised.value.code is ErrorCode.MOUNT_FAILED
    assert bind.destination in raised.value.message
    return raised.value.message


async def test_it_is_there_with_its_place_made(container: int, shared: Path, rootfs: Path) -> None:
    ours = mounts_of(os.getpid())
    bind_into(container, Bind(str(shared), "/made/for/it"))
    assert inside(container, "/made/for/it/file").read_text() == "shared\n"
    inside(container, "/made/for/it/back").write_text("back\n")
    assert (shared / "back").read_text() == "back\n"
    # What is below it is the container's, and nobody else has the mount.
    assert list((rootfs / "made" / "for" / "it").iterdir()) == []
    assert mounts_of(os.getpid()) == ours


async def test_read_only_is_what_it_says(container: int, shared: Path) -> None:
    bind_into(container, Bind(str(shared), "/look", read_only=True))
    assert "ro" in mounts_of(container)["/look"].split(",")
    with pytest.raises(OSError, match="Read-only file system"):
        inside(container, "/look/new").touch()
    bind_into(container, Bind(str(shared), "/write"))
    inside(container, "/write/new").touch()


async def test_links_at_its_path_stay_inside(
    container: int, shared: Path, rootfs: Path, tmp_path: Path
) -> None:
    (rootfs / "place").mkdir()
    (rootfs / "absolute").symlink_to("/place")
    (rootfs / "climbing").symlink_to("../../../../place")
    (rootfs / "outside").symlink_to(tmp_path)
    bind_into(container, Bind(str(shared), "/absolute"))
    assert (inside(container, "/place") / "file").read_text() == "shared\n"
    bind_into(container, Bind(str(shared), "/climbing/below"))
    assert "/place/below" in mounts_of(container)
    assert "Not a directory" in refusal(container, Bind(str(shared), "/outside/below"))
    assert sorted(os.listdir(shared)) == ["below", "file"]  # noqa: PTH208
    assert not (tmp_path / "below").exists()


async def test_what_is_no_directory_is_no_place_for_it(container: int, shared: Path) -> None:
    for destination in ("/etc/passwd", "/etc/passwd/below", "/bin/sh"):
        assert "Not a directory" in refusal(container, Bind(str(shared), destination))
    assert not any(name.startswith("/etc/passwd") for name in mounts_of(container))


async def test_a_file_or_a_socket_is_bound_as_a_directory_is(
    container: int, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file\n")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        bind_into(container, Bind(str(tmp_path / "file"), "/made/for/file"))
        bind_into(container, Bind(str(tmp_path / "socket"), "/made/for/socket"))
        assert inside(container, "/made/for/file").read_text() == "a file\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(inside(container, "/made/for/socket")))


async def test_what_is_made_anew_takes_the_place_of_what_it_was(
    container: int, tmp_path: Path
) -> None:
    source = tmp_path / "file"
    bind = Bind(str(source), "/there")
    for text in ("first", "second", "third"):
        source.unlink(missing_ok=True)
        source.write_text(text)
        bind_into(container, bind, replaces=True)
        assert inside(container, "/there").read_text() == text
        assert [path for path, _ in mount_points_of(container)].count("/there") == 1


async def test_a_source_or_a_container_that_is_gone_is_an_error(
    container: int, shared: Path
) -> None:
    missing = str(shared / "missing")
    assert "No such file" in refusal(container, Bind(missing, "/data"))
    assert "No such file" in refusal(2**22 + 1, Bind(str(shared), "/data"))


async def test_the_thread_that_enters_the_container_takes_nobody_along(
    container: int, shared: Path
) -> None:
    before = own_state()
    for number in range(5):
        bind_into(container, Bind(str(shared), f"/number/{number}"))
        refusal(container, Bind(str(shared), "/etc/passwd"))
    assert own_state() == before


def own_state() -> tuple[object, ...]:
    """Where this process is, and what it has running and open."""
    links = [Path("/proc/self", name).readlink() for name in ("cwd", "root", "ns/mnt")]
    files = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return (*links, threading.active_count(), files)


async def test_many_at_once_do_not_meet(container: int, shared: Path) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(10):
            bind = Bind(str(shared), f"/at/once/{number}")
            nursery.start_soon(trio.to_thread.run_sync, bind_into, container, bind)
    assert {f"/at/once/{number}" for number in range(10)} <= mounts_of(container).keys()
