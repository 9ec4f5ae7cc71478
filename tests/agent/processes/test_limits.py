"""How much workloads may take; what the kernel makes of it: tests/vm/test_vm_abuse.py."""

import logging
from pathlib import Path

import pytest

from agent.processes.cgroup import CgroupTree
from agent.processes.limits import Limits

MIB = 1 << 20

# MemTotal, threads-max and pid_max of VMs that were given 256 MiB, 1 GiB and 64 GiB.
SMALL = Limits.of_machine(total_memory_bytes=213 * MIB, threads_max=1434, pid_max=32768)
USUAL = Limits.of_machine(total_memory_bytes=968 * MIB, threads_max=7473, pid_max=32768)
LARGE = Limits.of_machine(total_memory_bytes=64_000 * MIB, threads_max=511_000, pid_max=32768)

# A shell that was forked by a shell: its stack in the kernel, its page tables, its own pages.
FORKED_SHELL_BYTES = 132 << 10


def test_a_vm_keeps_memory_for_the_kernel_and_the_agent() -> None:
    assert USUAL.memory_bytes == 779.5 * MIB
    assert USUAL.agent_memory_bytes == 64 * MIB
    assert LARGE.memory_bytes == 59_872 * MIB


def test_a_small_vm_keeps_what_these_two_need_in_any_vm() -> None:
    assert SMALL.memory_bytes is not None
    assert 64 * MIB < SMALL.memory_bytes < 80 * MIB
    assert 48 * MIB < SMALL.agent_memory_bytes < 64 * MIB


def test_a_vm_that_is_too_small_still_has_something_for_workloads() -> None:
    tiny = Limits.of_machine(total_memory_bytes=100 * MIB, threads_max=600, pid_max=32768)
    assert tiny.memory_bytes == 25 * MIB
    assert tiny.agent_memory_bytes == 25 * MIB


@pytest.mark.parametrize("limits", [SMALL, USUAL, LARGE])
def test_a_fork_bomb_fits_into_the_memory_and_leaves_processes_for_another_command(
    limits: Limits,
) -> None:
    assert limits.memory_bytes is not None
    assert limits.pids is not None
    assert limits.command_pids is not None
    assert limits.pids * FORKED_SHELL_BYTES < limits.memory_bytes
    assert limits.command_pids * 2 <= limits.pids


@pytest.mark.parametrize("limits", [SMALL, USUAL, LARGE])
def test_one_command_leaves_memory_for_another_to_start(limits: Limits) -> None:
    assert limits.memory_bytes is not None
    assert limits.command_memory_bytes is not None
    spared = limits.memory_bytes - limits.command_memory_bytes
    assert spared >= 8 * MIB
    assert spared < limits.memory_bytes // 8


def test_the_largest_pid_bounds_the_processes_of_a_large_vm() -> None:
    assert (USUAL.pids, USUAL.command_pids) == (1868, 934)
    assert (LARGE.pids, LARGE.command_pids) == (16384, 8192)


def test_what_is_given_goes_before_what_the_machine_has() -> None:
    mine = Limits.inspect(memory=320 * MIB, pids=100)
    assert (mine.memory_bytes, mine.command_memory_bytes) == (320 * MIB, 300 * MIB)
    assert (mine.pids, mine.command_pids) == (100, 50)
    assert mine.agent_memory_bytes == Limits.inspect().agent_memory_bytes
    assert Limits.inspect(pids=100, command_pids=7).command_pids == 7
    assert Limits.inspect(memory=8 * MIB).command_memory_bytes == 4 * MIB
    assert Limits.inspect(pids=1).command_pids == 1


def test_no_limit_of_all_is_none_of_one_either_unless_it_is_given() -> None:
    mine = Limits.inspect(memory="max", pids="max")
    assert mine.memory_bytes is mine.command_memory_bytes is None
    assert mine.pids is mine.command_pids is None
    assert Limits.inspect(pids="max", command_pids=7).command_pids == 7
    assert Limits.inspect(pids=100, command_pids="max").command_pids is None


async def test_without_controllers_nothing_is_limited(
    cgroup_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As for every cgroup whose parent distributes nothing."""
    caplog.set_level(logging.DEBUG, "agent.processes.limits")
    tree = CgroupTree.open(cgroup_root)
    limits = Limits.inspect()
    applied = limits.apply(tree.workloads.path)
    applied.limit_command(tree.commands)
    applied.open_container(tree.containers)
    limits.protect_agent(cgroup_root)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "workloads have no limits" in caplog.text
    assert (tree.commands / "cgroup.controllers").read_text().split() == []


def test_what_is_no_cgroup_is_told_and_gone_on_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    applied = Limits.inspect().apply(tmp_path)
    assert "workloads are not limited: No such file or directory" in caplog.text
    applied.limit_command(tmp_path)
    assert list(tmp_path.iterdir()) == []
