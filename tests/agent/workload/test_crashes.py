"""kill -9 of the agent at every step of a start: its command runs once, and the next one knows."""

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.processes.cgroup import Cgroup
from protocol.client import ConnectionFailed
from tests.support.chance import chance
from tests.support.machine import PROJECT
from tests.support.rounds import rounds
from tests.support.workload import Peer, open_log, open_peer, served

NEVER = 10**9


def script(directory: Path) -> tuple[str, ...]:
    """A workload that counts its starts, and ends with 7 when it is told to."""
    # The child says so: until it executes something it may take a signal for its parent's trap.
    waiting = "trap 'exit 7' TERM; sh -c 'echo on; exec sleep 1000' & wait; exit 8"
    return ("/bin/sh", "-c", f"echo start >>{directory}/starts; {waiting}")


def starts(directory: Path) -> int:
    file = directory / "starts"
    return file.read_text().count("\n") if file.exists() else 0


@asynccontextmanager
async def mortal(
    directory: Path, cgroup_root: Path, line: int, *words: str
) -> AsyncIterator[trio.Process]:
    """An agent that dies at a line of a start; killed when the block is left."""
    module = "tests.support.mortal_agent"
    argv = [str(each) for each in (directory, cgroup_root, line, *words)]
    start = partial(
        trio.run_process,
        [sys.executable, "-m", module, *argv],
        stdout=subprocess.PIPE,
        check=False,
        cwd=PROJECT,
    )
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(start)
        try:
            yield process
        finally:
            process.kill()


async def said(process: trio.Process, what: bytes) -> bytes:
    """What it prints, at least until that, or until it dies."""
    assert process.stdout is not None
    told = b""
    while what not in told and (more := await process.stdout.receive_some()):
        told += more
    return told


async def start_until_death(directory: Path, cgroup_root: Path, line: int, kind: str) -> int | None:
    """Have a workload started; how many lines that took, None where the agent died before."""
    words = script(directory)
    async with mortal(directory, cgroup_root, line, *(words if kind == "boot" else ())) as process:
        told = await said(process, b"serving\n")
        if kind == "host" and b"serving" in told:
            async with open_peer(f"unix:{directory / 'a.sock'}") as peer:
                await peer.run(1, *words)
                try:
                    await peer.until(lambda: peer.told(1).started)
                except ConnectionFailed:
                    return None
        if b"serving" in told:
            told += await said(process, b"\n")
        numbers = [int(word) for word in told.split() if word.isdigit()]
        return numbers[0] if numbers else None


async def ends_as_it_was_told(peer: Peer) -> None:
    await peer.signal(0, signal.SIGTERM)
    await peer.until(lambda: peer.told(0).exit == (7, "exited"))


@pytest.mark.timeout(rounds(120, 3600))
@pytest.mark.parametrize("kind", ["boot", "host"])
async def test_an_agent_that_is_killed_at_any_line_of_a_start_has_it_started_once_and_known(
    tmp_path: Path, cgroup_root: Path, kind: str
) -> None:
    (tmp_path / "whole").mkdir()
    (cgroup_root / "whole").mkdir()
    lines = await start_until_death(tmp_path / "whole", cgroup_root / "whole", NEVER, kind)
    assert lines is not None
    chances = chance(kind)
    for line in sorted(chances.sample(range(1, lines + 1), min(lines, rounds(4, lines)))):
        directory, cgroups = tmp_path / str(line), cgroup_root / str(line)
        directory.mkdir()
        cgroups.mkdir()
        print(f"{kind}: line {line} of {lines}")
        await start_until_death(directory, cgroups, line, kind)
        for path in directory.glob("a.sock*"):
            path.unlink()
        words = {"command": script(directory)} if kind == "boot" else {}
        async with (
            served(directory, cgroups, **words) as service,
            open_log(service.address) as log,
            open_peer(service.address) as peer,
        ):
            if kind == "boot":
                # Whichever agent's it is.
                await log.output(0, b"on\n")
                await ends_as_it_was_told(peer)
            else:
                await peer.run(1, "true")
                told = await peer.over(1)
                if told.exit is None:
                    # That agent has let it, and it goes on.
                    assert "one at a time" in str(told.error)
                    await log.output(0, b"on\n")
                    await peer.signal(0, signal.SIGTERM)
                else:
                    assert starts(directory) == 0
            assert starts(directory) == (1 if log.told(0).stdout else 0)
            tree = service.services.processes.tree
            assert tree is not None
            with trio.fail_after(20):
                await service.services.processes.seen_off(tree.commands)
            assert Cgroup.all_in(tree.commands) == []
            assert log.told(0).stdout == b"on\n" * starts(directory)
