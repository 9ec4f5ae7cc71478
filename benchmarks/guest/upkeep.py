"""The rows of what the agent costs while its commands do nothing, and after many of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import attrs

from benchmarks.guest.connection import STARTED, Connection, check, frame
from benchmarks.guest.row import Setting, verdict
from protocol import requests

SLEEPERS = 100
SETTLE_S = 2
CGROUPS = Path("/sys/fs/cgroup/workloads")

MOST_GROWTH_MB = 2.0
HANGUP_EVERY = 100


def sleepers(setting: Setting) -> str:
    """The processor time that the agent takes while commands sleep."""
    watched_s = setting.count(full=10, quick=2)
    commands = [
        requests.VmExec(command=("sleep", "1000"), interactive=True),
        requests.VmExec(command=("sleep", "1000")),
        # Its pipes are at their end, which must not be read again and again.
        requests.VmExec(command=("sh", "-c", "exec sleep 1000 >&- 2>&-"), interactive=True),
        requests.VmExec(command=("sleep", "1000"), timeout_ms=900_000),
    ]
    with ExitStack() as stack:
        for number in range(SLEEPERS):
            request = commands[number % len(commands)]
            host = stack.enter_context(Connection())
            host.socket.sendall(frame(request))
            if request.interactive:
                check(host.receive(), STARTED)
        # trio ends the threads that started them 10 s after their last work.
        time.sleep(setting.count(full=12, quick=2))
        agent = _agent_pid()
        running = sum(1 for path in CGROUPS.glob("commands/*") if path.is_dir())
        before = _ticks(agent)
        time.sleep(watched_s)
        ticks = _ticks(agent) - before
    is_met = ticks == 0 and running >= SLEEPERS
    name = f"CPU, {running} commands asleep"
    return f"{name:34} {ticks:8d} ticks in {watched_s} s{'0 ticks':>68}          {verdict(is_met)}"


@attrs.frozen
class _State:
    """What the agent holds."""

    resident_mb: float
    descriptors: int
    cgroups: int
    zombies: int

    @classmethod
    def of(cls, agent: int) -> _State:
        status = Path(f"/proc/{agent}/status").read_text().splitlines()
        resident = next(line for line in status if line.startswith("VmRSS:"))
        return cls(
            resident_mb=int(resident.split()[1]) * 1024 / 1e6,
            descriptors=sum(1 for _ in Path(f"/proc/{agent}/fd").iterdir()),
            cgroups=sum(1 for path in CGROUPS.rglob("*") if path.is_dir()),
            zombies=_zombies(agent),
        )


def soak(setting: Setting) -> str:
    """What is left of many commands."""
    count = setting.count(full=10_000, quick=500)
    agent = _agent_pid()
    _run_commands(setting.count(full=500, quick=200))
    time.sleep(SETTLE_S)
    before = _State.of(agent)
    _run_commands(count)
    time.sleep(SETTLE_S)
    after = _State.of(agent)
    growth = after.resident_mb - before.resident_mb
    more = after.descriptors - before.descriptors, after.cgroups - before.cgroups
    is_met = growth <= MOST_GROWTH_MB and max(more) <= 0 and after.zombies == 0
    figures = (
        f"{after.resident_mb:8.1f} MB   before: {before.resident_mb:.1f} MB; "
        f"descriptors {after.descriptors} ({more[0]:+d}), cgroups {after.cgroups} ({more[1]:+d}), "
        f"zombies {after.zombies}"
    )
    target = f"+{MOST_GROWTH_MB:g} MB, +0, +0, 0"
    return f"{f'after {count} commands':34} {figures:85} {target:20} {verdict(is_met)}"


def _run_commands(count: int) -> None:
    """All ways of running and ending; one host in a while hangs up on what it started."""

    def plain(*argv: str) -> bytes:
        return frame(requests.VmExec(command=argv))

    def interactive(*argv: str) -> bytes:
        return frame(requests.VmExec(command=argv, interactive=True))

    true, shell = ("true",), ("sh", "-c")
    missing = ("no-such-program",)
    ways: list[Callable[[Connection], None]] = [
        lambda host: host.complete(plain(*true)),
        lambda host: host.attend(interactive(*true)),
        lambda host: host.complete(plain(*shell, "exit 3"), 3),
        lambda host: host.attend(interactive(*shell, "exit 3"), 3),
        lambda host: host.complete(plain(*shell, "kill -9 $$"), 137),
        lambda host: check(host.ask(plain(*missing)), b'{"status":"error"'),
        lambda host: host.attend(interactive(*true)),
        lambda host: check(host.ask(interactive(*missing)), b'{"status":"error"'),
    ]
    for begin in range(0, count, HANGUP_EVERY):
        with Connection() as host:
            for number in range(begin, min(count, begin + HANGUP_EVERY) - 1):
                ways[number % len(ways)](host)
            check(host.ask(interactive("sleep", "1000")), STARTED)


def _agent_pid() -> int:
    with Connection() as host:
        return host.peer_pid


def _ticks(pid: int) -> int:
    """utime and stime of all its threads, see proc(5)."""
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12])


def _zombies(parent: int) -> int:
    """How many of its children nobody has waited for."""
    zombies = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = _stat(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
        zombies += fields[0] == "Z" and int(fields[1]) == parent
    return zombies


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
