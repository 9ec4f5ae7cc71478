"""The workload that a boot starts: id 0 for everyone, its restarts, its log, another agent."""

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from protocol import workload
from protocol.client import ConnectionFailed
from tests.support.workload import Peer, open_log, open_peer, served

SH = ("/bin/sh", "-c")


async def test_the_boots_workload_has_id_0_and_its_exit_is_sent_to_every_connection_and_later_ones(
    tmp_path: Path, cgroup_root: Path
) -> None:
    command = (*SH, "trap 'exit 7' TERM; echo on; sleep 1000 & wait")
    async with (
        served(tmp_path, cgroup_root, command=command) as service,
        open_peer(service.address) as one,
        open_peer(service.address) as two,
        open_log(service.address) as log,
    ):
        await log.output(0, b"on")
        await two.exec(0, "true")
        await two.until(lambda: two.told(0).error is not None)
        assert "0 is that of the workload" in str(two.told(0).error)
        await one.signal(0, signal.SIGTERM)
        for peer in (one, two):
            await peer.until(lambda peer=peer: peer.told(0).exit == (7, "exited"))
        async with open_peer(service.address) as later:
            await later.until(lambda: later.told(0).exit is not None)
            assert later.order == [workload.Ready(), workload.Exit(0, 7, "exited")]
            await later.run(1, "true")
            assert (await later.over(1)).exit == (0, "exited")


@pytest.mark.parametrize(
    ("restart", "status", "times"),
    [("never", 1, 1), ("on-failure", 0, 1), ("on-failure", 1, 3), ("always", 0, 3)],
)
async def test_the_boots_workload_is_started_again_as_its_policy_has_it(
    tmp_path: Path, cgroup_root: Path, restart: str, status: int, times: int
) -> None:
    command = (*SH, f"echo again >>{tmp_path}/starts; exit {status}")
    async with (
        served(tmp_path, cgroup_root, command=command, restart=restart) as service,
        open_peer(service.address, ready=False) as peer,
    ):
        exits = 0
        while exits < times:
            exits += isinstance(await peer.receive(), workload.Exit)
        starts = (tmp_path / "starts").read_text().split()
        assert len(starts) >= times
        if times == 1:
            # Once more would come after 0.1 s.
            with trio.move_on_after(0.5):
                message = await peer.receive()
                assert isinstance(message, workload.Ready)
            assert len((tmp_path / "starts").read_text().split()) == 1
            return
        await peer.run(1, "true")
        assert "one at a time" in str((await peer.over(1)).error)
        await peer.stop(0)
        await _runs_again(peer)


async def test_restarts_come_after_a_pause_that_doubles(tmp_path: Path, cgroup_root: Path) -> None:
    async with (
        served(tmp_path, cgroup_root, command=("false",), restart="always") as service,
        open_peer(service.address) as peer,
    ):
        at = []
        while len(at) < 4:
            if isinstance(await peer.receive(), workload.Exit):
                at.append(trio.current_time())
    pauses = [later - earlier for earlier, later in pairwise(at)]
    assert pauses[-1] >= 0.35
    assert pauses[-2] >= 0.15


async def test_a_workload_that_cannot_be_started_is_tried_again(
    tmp_path: Path, cgroup_root: Path
) -> None:
    program = tmp_path / "program"
    async with (
        served(tmp_path, cgroup_root, command=(str(program),), restart="on-failure") as service,
        open_peer(service.address) as peer,
    ):
        await peer.until(lambda: peer.told(0).exit is not None)
        assert str(peer.told(0).exit).startswith("(127, 'failed to start: ")
        new = tmp_path / "new"
        new.write_text("#!/bin/sh\nexit 0\n")
        new.chmod(0o755)
        new.rename(program)
        await peer.until(lambda: peer.told(0).exit == (0, "exited"))


async def test_the_log_is_told_from_its_beginning_then_live_to_any_number_of_readers(
    tmp_path: Path, cgroup_root: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = (*SH, f"echo first; echo error >&2; cat {fifo}; sleep 1000")
    async with (
        served(tmp_path, cgroup_root, command=command) as service,
        open_log(service.address) as early,
    ):
        await early.output(0, b"first\n")
        await early.output(0, b"error\n")
        async with open_log(service.address) as late:
            await trio.to_thread.run_sync(fifo.write_text, "second\n")
            for reader in (early, late):
                await reader.output(0, b"second\n")
                assert reader.told(0).stdout == b"first\nsecond\n"
                assert reader.told(0).stderr == b"error\n"
                assert reader.told(0).truncated == 0
            await late.exec(3, "true")
            assert "port 5000" in str((await late.over(3)).error)
            await late.send(workload.Auth("again", 1))
            assert await late.closed()
            assert late.order[-1] == workload.AuthFailed()


async def test_the_log_keeps_its_last_bytes_and_says_that_some_went_before(
    tmp_path: Path, cgroup_root: Path
) -> None:
    size = 256 * 1024
    async with (
        served(tmp_path, cgroup_root, log_bytes=size) as service,
        open_peer(service.address) as peer,
    ):
        await peer.run(1, *SH, "seq 1 100000")
        await peer.over(1)
        written = "".join(f"{number}\n" for number in range(1, 100001)).encode()
        async with open_log(service.address) as reader:
            told = await reader.output(0, b"\n100000\n")
            assert told.stdout == written[-size:]
            assert told.truncated == 1


async def test_the_workload_and_its_log_survive_the_agent(
    tmp_path: Path, cgroup_root: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"trap 'exit 9' USR1; echo one; cat {fifo}; echo three; sleep 1000 & wait"
    async with served(tmp_path, cgroup_root) as service, open_peer(service.address) as peer:
        await peer.run(1, *SH, script)
        await peer.output(1, b"one")
    with pytest.raises(ConnectionFailed):
        await peer.receive()
    await trio.to_thread.run_sync(fifo.write_text, "two\n")
    async with (
        served(tmp_path, cgroup_root) as service,
        open_log(service.address) as reader,
        open_peer(service.address) as peer,
    ):
        told = await reader.output(0, b"three\n")
        assert told.stdout == b"one\ntwo\nthree\n"
        await peer.run(1, "true")
        assert "one at a time" in str((await peer.over(1)).error)
        await peer.signal(0, signal.SIGUSR1)
        await _runs_again(peer)


async def _runs_again(peer: Peer) -> None:
    """The workload's place is free in the end; asking before is an error and no more."""
    number = 100
    while True:
        number += 1
        await peer.run(number, "true")
        if (await peer.over(number)).exit == (0, "exited"):
            return


@pytest.mark.parametrize("ends", ["before the next agent", "after it"])
async def test_the_next_agent_knows_how_the_boots_workload_has_ended_and_starts_it_once(
    tmp_path: Path, cgroup_root: Path, ends: str
) -> None:
    script = f"echo start >>{tmp_path}/starts; trap 'exit 9' USR1; sleep 1000 & echo on; wait"
    async with (
        served(tmp_path, cgroup_root, command=(*SH, script)) as service,
        open_log(service.address) as reader,
        open_peer(service.address) as peer,
    ):
        await reader.output(0, b"on")
        if ends == "before the next agent":
            await peer.signal(0, signal.SIGUSR1)
            await peer.until(lambda: peer.told(0).exit == (9, "exited"))
    async with (
        served(tmp_path, cgroup_root, command=(*SH, script)) as service,
        open_peer(service.address) as peer,
    ):
        if ends == "after it":
            await peer.signal(0, signal.SIGUSR1)
        await peer.until(lambda: peer.told(0).exit == (9, "exited"))
        async with open_peer(service.address) as later:
            await later.until(lambda: later.told(0).exit == (9, "exited"))
    assert (tmp_path / "starts").read_text() == "start\n"
