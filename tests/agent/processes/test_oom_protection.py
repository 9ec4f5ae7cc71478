"""The agent's oom_score_adj is its own: real children, looked at in /proc.

To lower it takes CAP_SYS_RESOURCE, which root does not have everywhere. Here it stays what it was,
and is raised for children; tests/vm/test_vm_abuse.py sees the image's -1000.
"""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest

from agent.processes.cgroup import Cgroup
from agent.processes.oom_protection import OomProtection
from tests.support.rounds import rounds


def score_adj(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


OWN = score_adj()
OF_CHILDREN = OWN + 7


@pytest.fixture
def protection() -> Iterator[OomProtection]:
    with OomProtection.held(OWN, OF_CHILDREN) as held:
        yield held
    assert score_adj() == OWN


@contextmanager
def child(script: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A shell that runs a script, and is killed after the block if it still does."""
    with subprocess.Popen(
        ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[bytes]") -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def tell(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    process.stdin.write(b"go on\n")
    process.stdin.flush()


def test_a_child_loses_the_protection_that_it_was_born_with(protection: OomProtection) -> None:
    with child("read -r go; cat /proc/$$/oom_score_adj; cat /proc/self/oom_score_adj") as process:
        assert score_adj(process.pid) == OWN
        protection.unprotect(process.pid, None)
        assert score_adj(process.pid) == OF_CHILDREN
        # It was stopped meanwhile, and goes on.
        tell(process)
        assert (said(process), said(process)) == (OF_CHILDREN, OF_CHILDREN)
        assert process.wait() == 0
    assert score_adj() == OWN


async def test_so_does_what_it_has_forked_by_then(
    protection: OomProtection, cgroup_root: Path
) -> None:
    with child("read -r go; sleep 1000 & echo $!; wait") as process:
        (cgroup_root / "cgroup.procs").write_text(str(process.pid))
        tell(process)
        forked = said(process)
        assert score_adj(forked) == OWN
        protection.unprotect(process.pid, Cgroup(cgroup_root))
        assert (score_adj(process.pid), score_adj(forked)) == (OF_CHILDREN, OF_CHILDREN)


# Each forks the next one, and two of them say that it has come to them.
CHAIN = """
import os, signal, sys
sys.stdin.readline()
for number in range(30):
    if os.fork():
        signal.pause()
    if number in (4, 29):
        print(number, flush=True)
signal.pause()
"""


async def test_so_does_what_is_being_forked_at_that_moment(
    protection: OomProtection, cgroup_root: Path
) -> None:
    for _ in range(rounds(8, 200)):
        cgroup = Cgroup.make(cgroup_root)
        with child(f"exec {sys.executable} -I -S -c '{CHAIN}'") as process:
            (cgroup.path / "cgroup.procs").write_text(str(process.pid))
            tell(process)
            try:
                assert said(process) == 4
                protection.unprotect(process.pid, cgroup)
                assert said(process) == 29
                assert {score_adj(pid) for pid in cgroup.pids()} == {OF_CHILDREN}
            finally:
                cgroup.kill()


def test_eight_threads_start_children_at_once_and_each_is_right(protection: OomProtection) -> None:
    at_once = Barrier(8)

    def start_some(_: int) -> set[int]:
        at_once.wait()
        found = set()
        for _ in range(10):
            with child("read -r go; cat /proc/$$/oom_score_adj") as process:
                protection.unprotect(process.pid, None)
                tell(process)
                found.add(said(process))
        return found

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(start_some, range(8))) == [{OF_CHILDREN}] * 8


def test_what_has_ended_by_then_can_still_be_waited_for(protection: OomProtection) -> None:
    with child("echo 1; exit 7") as process:
        assert said(process) == 1
        assert process.stdout is not None
        assert process.stdout.read() == b""
        protection.unprotect(process.pid, None)
        assert process.wait() == 7


def test_who_has_chosen_a_value_keeps_it(protection: OomProtection) -> None:
    chosen = OWN + 9
    with child(f"echo {chosen} >/proc/$$/oom_score_adj; echo 1; read -r go") as process:
        assert said(process) == 1
        protection.unprotect(process.pid, None)
        assert score_adj(process.pid) == chosen


def test_without_protection_nothing_is_written() -> None:
    with child("read -r go") as process:
        OomProtection().unprotect(process.pid, None)
        assert score_adj(process.pid) == OWN


def test_a_refusal_is_told_and_gone_on_without(caplog: pytest.LogCaptureFixture) -> None:
    files = open_files()
    # No privilege is enough for this one.
    with OomProtection.held(own=-1001) as protection, child("read -r go") as process:
        assert "the agent may be killed for memory: Invalid argument" in caplog.text
        protection.unprotect(process.pid, None)
        assert score_adj(process.pid) == score_adj() == OWN
    assert open_files() == files


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
