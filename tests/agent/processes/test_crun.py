"""How crun tells what became of a command: by a FIFO, a log, and a socket for the terminal.

What plays crun here does the same in the order that a test wants.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from agent.processes.command import Command
from agent.processes.crun import Invocation
from agent.processes.process import Process, Stdio
from agent.processes.service import Processes

PATIENCE_S = 20

# Makes a terminal, says something on it, and sends it as crun does.
SEND_TERMINAL = """
import os, socket, sys
master, slave = os.openpty()
os.write(slave, b"said before the end")
os.chdir(sys.argv[1])  # an address has at most 108 bytes
peer = socket.socket(socket.AF_UNIX)
peer.connect("console")
socket.send_fds(peer, [b"/dev/pts/0"], [master])
open("pid", "w").write("4711")
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    # Deeper than a socket's address may be long.
    path = tmp_path / ("d" * 100) / "invocation"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def invocation(directory: Path) -> Iterator[Invocation]:
    prepared = Invocation.prepare(directory, terminal=False)
    yield prepared
    prepared.close()


@pytest.fixture
def on_terminal(directory: Path) -> Iterator[Invocation]:
    prepared = Invocation.prepare(directory, terminal=True)
    yield prepared
    prepared.close()


def shell(script: str, directory: Path) -> Command:
    return Command.from_request(("sh", "-c", script), workdir=str(directory))


async def output_of(process: Process) -> bytes:
    data = b""
    for pipe in process.outputs.values():
        while more := await pipe.receive():
            data += more
    return data


async def test_it_has_started_when_the_pid_is_told(
    processes: Processes, invocation: Invocation, directory: Path
) -> None:
    assert invocation.options == [f"--pid-file={directory}/pid"]
    assert not invocation.has_started()
    script = "echo 4711 >pid; exec sleep 1000"
    with trio.fail_after(PATIENCE_S):
        async with processes.running(shell(script, directory), Stdio()) as process:
            assert await invocation.started(process)
            assert process.exit_code is None
    assert invocation.pid == 4711


async def test_it_has_started_also_when_it_is_over_already(
    processes: Processes, invocation: Invocation, directory: Path
) -> None:
    async with processes.running(shell("echo 4711 >pid", directory), Stdio()) as process:
        await process.wait()
        assert await invocation.started(process)
    assert invocation.pid == 4711


async def test_it_has_not_started_when_it_ends_without_having_told_a_pid(
    processes: Processes, invocation: Invocation, directory: Path
) -> None:
    with trio.fail_after(PATIENCE_S):
        async with processes.running(shell("exit 1", directory), Stdio()) as process:
            assert not await invocation.started(process)
    assert invocation.pid is None


async def test_nobody_waits_for_a_terminal_that_never_comes(
    processes: Processes, on_terminal: Invocation, directory: Path
) -> None:
    with trio.fail_after(PATIENCE_S):
        async with processes.running(shell("exit 1", directory), Stdio()) as process:
            assert not await on_terminal.started(process)
            assert process.terminal is None


async def test_a_caller_who_does_not_send_a_terminal_is_no_reason_to_wait(
    processes: Processes, on_terminal: Invocation, directory: Path
) -> None:
    script = SEND_TERMINAL.replace("socket.send_fds(peer, [b", "peer.sendall(b").replace(
        "], [master])", ")"
    )
    command = Command.from_request((sys.executable, "-c", script, str(directory)))
    with trio.fail_after(PATIENCE_S):
        async with processes.running(command, Stdio()) as process:
            assert await on_terminal.started(process)
            assert process.terminal is None


async def test_the_terminal_takes_the_place_of_its_pipes(
    processes: Processes, on_terminal: Invocation, directory: Path
) -> None:
    assert f"--console-socket={directory}/console" in on_terminal.options
    command = Command.from_request((sys.executable, "-c", SEND_TERMINAL, str(directory)))
    with trio.fail_after(PATIENCE_S):
        async with processes.running(command, Stdio()) as process:
            assert await on_terminal.started(process)
            assert process.terminal is not None
            assert await output_of(process) == b"said before the end"


async def test_what_a_command_said_on_its_terminal_is_there_when_it_is_over_already(
    processes: Processes, on_terminal: Invocation, directory: Path
) -> None:
    command = Command.from_request((sys.executable, "-c", SEND_TERMINAL, str(directory)))
    with trio.fail_after(PATIENCE_S):
        async with processes.running(command, Stdio()) as process:
            await process.wait()
            assert await on_terminal.started(process)
            assert process.terminal is not None
            assert await output_of(process) == b"said before the end"


def test_its_complaints_are_one_line(invocation: Invocation, directory: Path) -> None:
    assert invocation.complaint() == ""
    invocation.log.write_bytes(b"first thing \n\n  second thing\xff\n")
    assert invocation.complaint() == "first thing; second thing\N{REPLACEMENT CHARACTER}"


async def test_it_leaves_no_descriptor(processes: Processes, directory: Path) -> None:
    before = descriptors()
    for terminal in (False, True):
        for name in ("taken", "left"):
            place = directory / f"{name}-{terminal}"
            place.mkdir()
            invocation = Invocation.prepare(place, terminal=terminal)
            if terminal and name == "taken":
                command = Command.from_request((sys.executable, "-c", SEND_TERMINAL, str(place)))
                async with processes.running(command, Stdio()) as process:
                    await invocation.started(process)
                    await output_of(process)
            invocation.close()
    assert descriptors() == before


def descriptors() -> int:
    """How many this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
