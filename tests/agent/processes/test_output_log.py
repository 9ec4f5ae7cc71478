"""The logs of what runs in the background: bounded, kept over agents, and no burden to a writer."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from agent.linux.mount import MNT_DETACH, mount, umount2
from agent.processes.command import Command
from agent.processes.output_log import FILE_BYTES, OutputLog, OutputLogs
from agent.processes.service import Processes, open_processes
from tests.support.lifelines import lifeline
from tests.support.watch import until

PATIENCE_S = 20


@pytest.fixture
def logs(tmp_path: Path) -> OutputLogs:
    return OutputLogs(tmp_path / "logs")


@contextmanager
def writing_to(log: OutputLog) -> Iterator[int]:
    """A command's end of a log's pipe."""
    descriptor = os.open(log.fifo, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def kept(log: OutputLog) -> bytes:
    files = sorted(log.directory.glob("output*"), reverse=True)
    return b"".join(file.read_bytes() for file in files)


@asynccontextmanager
async def followed(logs: OutputLogs, log: OutputLog) -> AsyncIterator[None]:
    """Let it be written for the block, and until its writers have gone."""
    reader = log.open_reader()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            with writing_to(log):
                nursery.start_soon(logs.follow, log, reader)
                yield
    assert not reader.is_open or reader.read() == b""
    reader.close()


async def test_what_is_written_is_in_the_log_in_its_order(logs: OutputLogs) -> None:
    log = logs.new()
    async with followed(logs, log):
        with writing_to(log) as pipe:
            for number in range(100):
                os.write(pipe, b"line %d\n" % number)
                await trio.lowlevel.checkpoint()
    log.end()
    assert kept(log) == b"".join(b"line %d\n" % number for number in range(100))
    assert (log.directory / "ended").exists()
    assert not log.fifo.exists()


async def test_it_keeps_the_newest_in_two_files_of_4_mib(logs: OutputLogs) -> None:
    log = logs.new()
    written = bytearray()
    async with followed(logs, log):
        with writing_to(log) as pipe:
            for number in range(3000):
                chunk = b"%08d" % number * 500
                written += chunk
                await trio.to_thread.run_sync(os.write, pipe, chunk)
    log.end()
    sizes = {file.name: file.stat().st_size for file in log.directory.glob("output*")}
    assert sizes == {"output.1": FILE_BYTES, "output": len(written) % FILE_BYTES}
    assert kept(log) == written[-FILE_BYTES - sizes["output"] :]


async def test_the_next_agent_goes_on_where_the_last_one_stopped(logs: OutputLogs) -> None:
    log = logs.new()
    log.name("4711")
    with writing_to(log) as pipe:
        reader = log.open_reader()
        os.write(pipe, b"one ")
        assert log.take(reader)
        os.write(pipe, b"two ")
        # As by SIGKILL: what was not taken is still in the pipe.
        reader.close()
        log.close()
        os.write(pipe, b"three ")
        assert logs.unended() == ["4711"]
        again = logs.of("4711")
        reader = again.open_reader()
        assert again.take(reader)
        os.write(pipe, b"four")
        assert again.take(reader)
    assert not again.take(reader)
    again.end()
    assert kept(again) == b"one two three four"
    assert logs.unended() == []
    reader.close()


async def test_a_log_whose_writers_went_while_no_agent_was_there_is_ended(
    cgroup_root: Path, tmp_path: Path
) -> None:
    logs = OutputLogs(tmp_path / "logs")
    log = logs.new()
    log.name("4711")
    async with open_processes(cgroup_root, tmp_path / "logs"):
        await until((log.directory / "ended").exists, log.directory)
    unfinished = logs.new()
    async with open_processes(cgroup_root, tmp_path / "logs"):
        assert not unfinished.directory.exists()
        assert log.directory.exists()


async def test_a_name_that_comes_again_is_that_of_the_newer(logs: OutputLogs) -> None:
    older, newer = logs.new(), logs.new()
    older.name("4711")
    older.end()
    newer.name("4711")
    assert newer.directory.name == "4711"
    assert newer.fifo.exists()
    assert not (newer.directory / "ended").exists()


async def test_of_those_that_have_ended_the_newest_are_kept(logs: OutputLogs) -> None:
    running = logs.new()
    running.name("running")
    for number in range(20):
        log = logs.new()
        log.name(str(number))
        log.end()
        os.utime(log.directory / "ended", ns=(number, number))
    logs.tidy()
    assert {path.name for path in logs.directory.iterdir()} == {
        "running",
        *(str(number) for number in range(4, 20)),
    }


async def test_one_that_never_was_leaves_nothing(logs: OutputLogs) -> None:
    logs.new().remove()
    logs.new()
    assert logs.unended() == []
    logs.forget_unfinished()
    assert list(logs.directory.iterdir()) == []
    assert OutputLogs(logs.directory / "none").unended() == []


async def test_a_full_disk_loses_output_and_stops_no_process(
    cgroup_root: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    mount("tmpfs", logs, fstype="tmpfs", data="size=200k")
    try:
        with lifeline(tmp_path) as line, trio.fail_after(PATIENCE_S):
            async with open_processes(cgroup_root, logs) as processes:
                script = line.script("head -c 5000000 /dev/zero && printf . >&9")
                pid = await processes.start_background(Command.from_request(("sh", "-c", script)))
                await line.heard()
                await line.heard()
                await line.ended()
                log = logs / str(pid)
                await until((log / "ended").exists, log)
                assert 0 < (log / "output").stat().st_size <= 200 * 1024
    finally:
        umount2(logs, MNT_DETACH)


async def test_nobody_else_may_read_them(processes: Processes, tmp_path: Path) -> None:
    pid = await processes.start_background(Command.from_request(("echo", "secret")))
    log = tmp_path / "logs" / str(pid)
    await until((log / "ended").exists, log)
    assert [path.stat().st_mode & 0o777 for path in (log, log / "output")] == [0o700, 0o600]
