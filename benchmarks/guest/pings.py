"""The rows of pings: alone, and beside commands that stream and connections that idle."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.guest.connection import AGENT, Connection, frame
from benchmarks.guest.python import python
from benchmarks.guest.references import reference
from benchmarks.guest.row import Ratio, Setting, durations, interleaved, median_duration, p99
from protocol import requests

PING = frame(requests.Ping())
LONGEST_PONG = 4096

STREAMING, IDLE = 64, 500
PAUSE_S = 0.002
SETTLED_S = 30
COMMANDS = Path("/sys/fs/cgroup/workloads/commands")


def ping(setting: Setting) -> Ratio:
    """The median of a ping on an open connection."""
    pings = setting.count(full=400, quick=100)
    with reference("echo") as path, Connection(AGENT) as agent, Connection(path) as bare:
        for peer in (agent, bare):
            durations(pings, partial(_ping, peer))
        ours, theirs = interleaved(
            setting.count(full=40, quick=5),
            lambda: median_duration(pings, partial(_ping, agent)),
            lambda: median_duration(pings, partial(_ping, bare)),
        )
    return Ratio(
        name="ping, p50",
        ours=ours * 1e6,
        reference=theirs * 1e6,
        against="bare trio echo",
        unit="µs",
        limit=1.6,
    )


def loaded_ping(setting: Setting) -> Ratio:
    """One ping in a hundred takes so long, beside what keeps the agent busy."""
    name = f"ping, p99, {STREAMING} stream, {IDLE} idle"
    seconds = setting.count(full=6, quick=1)
    streamed: list[float] = []
    # Who pings goes before everybody else, as a host does that is another machine: its own waiting
    # for a processor is not the agent's.
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    with Connection() as agent:
        durations(100, partial(_ping, agent))

        def loaded() -> float:
            with ExitStack() as stack:
                for _ in range(IDLE):
                    _ping(stack.enter_context(Connection()))
                with _streaming(streamed):
                    return _p99_over(seconds, agent)

        ours, idle = interleaved(
            setting.count(full=5, quick=1), loaded, lambda: _p99_over(seconds, agent)
        )
    return Ratio(
        name=name,
        ours=ours * 1e3,
        reference=idle * 1e3,
        against="the same at rest",
        unit="ms",
        limit=50,
        below=50,
        note=f" (they stream {min(streamed):.0f} MB/s)",
    )


def _ping(peer: Connection) -> None:
    peer.socket.sendall(PING)
    # It comes in one piece.
    if not peer.socket.recv(LONGEST_PONG):
        raise RuntimeError("the other end hung up")


def _p99_over(seconds: float, agent: Connection) -> float:
    taken = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(PAUSE_S)
        taken += durations(1, partial(_ping, agent))
    return p99(taken)


@contextmanager
def _streaming(streamed: list[float]) -> Iterator[None]:
    """Commands that write without end, and are read, for the block; appends their MB/s."""
    command = python("benchmarks.guest.readers", str(STREAMING))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as readers:
        assert readers.stdin is not None
        assert readers.stdout is not None
        try:
            if not readers.stdout.readline():
                raise RuntimeError("the streams did not start")
            yield
            readers.stdin.close()
            streamed.append(float(readers.stdout.readline()))
        finally:
            readers.kill()
    # The agent kills them when their readers have gone; what comes next is measured at rest.
    deadline = time.monotonic() + SETTLED_S
    while any(path.is_dir() for path in COMMANDS.iterdir()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"commands are left in {COMMANDS} after {SETTLED_S} s")
        time.sleep(0.01)
