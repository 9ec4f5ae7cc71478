"""The agent's oom_score_adj is its own: real children, looked at in /proc.

To lower it takes CAP_SYS_RESOURCE, which root does not have everywhere. Here it stays what it was,
and is raised for children; tests/vm/test_vm_abuse.py sees the image's -1000.
"""

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Barrier

import pytest

from agent.processes.oom_protection import OomProtection


def score_adj(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


OWN = score_adj()
OF_CHILDREN = OWN + 7


def score_adj_of_child(around: Callable[[], AbstractContextManager[None]]) -> int:
    """What a child has that is started within a context, and what it passes on to its own."""
    script = "cat /proc/$$/oom_score_adj; cat /proc/self/oom_score_adj; read -r end"
    with around():
        child = subprocess.Popen(
            ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    with child:
        assert child.stdout is not None
        its_own, its_childs = int(child.stdout.readline()), int(child.stdout.readline())
        assert its_own == its_childs == score_adj(child.pid)
    return its_own


def test_a_child_does_not_inherit_the_protection_if_it_is_started_while_it_is_lifted() -> None:
    before = score_adj()
    with OomProtection.held(OWN, OF_CHILDREN) as protection:
        assert score_adj() == OWN
        assert score_adj_of_child(protection.lifted) == OF_CHILDREN
        assert score_adj() == OWN
        assert score_adj_of_child(nullcontext) == OWN
    assert score_adj() == before


def test_eight_threads_start_children_at_once_and_each_is_right() -> None:
    at_once = Barrier(8)
    with OomProtection.held(OWN, OF_CHILDREN) as protection:

        def start_some(_: int) -> set[int]:
            at_once.wait()
            return {score_adj_of_child(protection.lifted) for _ in range(10)}

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(start_some, range(8))) == [{OF_CHILDREN}] * 8
        assert score_adj() == OWN


def test_protection_comes_back_with_the_last_of_several_spawns_and_after_a_failed_one() -> None:
    with OomProtection.held(OWN, OF_CHILDREN) as protection:
        with protection.lifted():
            with protection.lifted():
                assert score_adj() == OF_CHILDREN
            assert score_adj() == OF_CHILDREN
        assert score_adj() == OWN
        with pytest.raises(FileNotFoundError), protection.lifted():
            subprocess.Popen(["/no/such/program"])
        assert score_adj() == OWN


def test_without_protection_nothing_is_written() -> None:
    before = score_adj()
    assert score_adj_of_child(OomProtection().lifted) == before
    assert score_adj() == before


def test_a_refusal_is_told_and_gone_on_without(caplog: pytest.LogCaptureFixture) -> None:
    before = score_adj()
    files = open_files()
    # No privilege is enough for this one.
    with OomProtection.held(own=-1001) as protection:
        assert score_adj_of_child(protection.lifted) == before
    assert "the agent may be killed for memory: Invalid argument" in caplog.text
    assert score_adj() == before
    assert open_files() == files


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
