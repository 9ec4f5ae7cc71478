"""What is known of a command when it has ended."""

import resource
import signal
from pathlib import Path

import pytest
import trio

from agent.processes.command import Command
from agent.processes.outcome import Outcome
from agent.processes.process import Stdio, kill_all
from agent.processes.service import Processes, open_processes
from tests.support.lifelines import lifeline

MIB = 1024 * 1024
PATIENCE_S = 20

# About as long as a test may take, and sure to be counted.
BUSY = "i=0; while [ $i -lt 150000 ]; do i=$((i + 1)); done"


async def outcome_of(
    processes: Processes, *command: str, timeout_s: float | None = None
) -> Outcome:
    """How a command ends; a single word is a shell script."""
    words = ("sh", "-c", *command) if len(command) == 1 else command
    with trio.fail_after(PATIENCE_S):
        collected = await processes.execute(Command.from_request(words), timeout_s=timeout_s)
    return collected.outcome


async def test_a_status_is_an_exit_code_and_no_signal(processes: Processes) -> None:
    for code in (0, 1, 124, 137, 255):
        assert await outcome_of(processes, f"exit {code}") == Outcome(exit_code=code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE])
async def test_a_signal_is_told_beside_its_exit_code(
    processes: Processes, number: signal.Signals
) -> None:
    outcome = await outcome_of(processes, f"kill -{int(number)} $$")
    assert outcome == Outcome(exit_code=128 + number, signal=number)


async def test_a_time_limit_is_told_and_not_the_signal_that_it_took(processes: Processes) -> None:
    outcome = await outcome_of(processes, "sleep 1000", timeout_s=0.2)
    assert outcome == Outcome(exit_code=124, timed_out=True)
    assert outcome.duration_ms is not None
    assert 200 <= outcome.duration_ms < 2000


async def test_the_duration_is_the_commands_own_and_not_its_outputs(
    processes: Processes,
) -> None:
    outcome = await outcome_of(processes, "sleep 0.2; sleep 1000 &")
    assert outcome.duration_ms is not None
    assert 200 <= outcome.duration_ms < 1200


async def test_processor_time_is_that_of_all_processes(
    processes: Processes, tmp_path: Path
) -> None:
    idle = await outcome_of(processes, "sleep", "0.2")
    alone = await outcome_of(processes, BUSY)
    # In children that are waited for, and in one that is not.
    shared = await outcome_of(processes, f"({BUSY}); (({BUSY}; kill $$) & sleep 1000)")
    assert idle.cpu_us is not None
    assert alone.cpu_us is not None
    assert shared.cpu_us is not None
    assert idle.cpu_us < 50_000 < alone.cpu_us < shared.cpu_us


@pytest.mark.parametrize("script", ["exec {}", "{}; exit 0"], ids=["itself", "a child of it"])
async def test_the_most_memory_is_told_where_it_can_be_known(
    processes: Processes, script: str
) -> None:
    # That of this process covers up less, and depends on what tests it has run.
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 100 * MIB
    outcome = await outcome_of(processes, script.format(f"python3 -c 'x = bytearray({size})'"))
    assert outcome.peak_memory_bytes is not None
    assert size <= outcome.peak_memory_bytes < size + 100 * MIB
    assert not outcome.oom


async def test_less_memory_than_the_agents_own_cannot_be_known_without_a_controller(
    processes: Processes,
) -> None:
    # The cgroups of tests have none: nobody has delegated it to them.
    assert (await outcome_of(processes, "true", "")).peak_memory_bytes is None


async def test_without_cgroups_the_command_and_its_children_are_counted(tmp_path: Path) -> None:
    async with open_processes(None, tmp_path / "logs") as processes:
        outcome = await outcome_of(processes, f"({BUSY}); exit 3")
        assert outcome == Outcome(exit_code=3)
        assert outcome.cpu_us is not None
        assert outcome.cpu_us > 50_000


async def test_a_tree_that_forks_without_end_is_dead_in_the_end(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        for _ in range(5):
            script = line.script("while :; do (setsid sh -c ':' &) ; setsid sh -c ':' & done")
            outcome = await outcome_of(processes, script, timeout_s=0.1)
            assert outcome.timed_out
            assert line.is_let_go()


async def test_killing_all_returns_when_nothing_is_left(
    processes: Processes, tmp_path: Path
) -> None:
    assert processes.tree is not None
    with lifeline(tmp_path) as line, trio.fail_after(PATIENCE_S):
        async with processes.running(
            Command.from_request(
                ("sh", "-c", line.script("trap '' TERM HUP; setsid sleep 1000 & sleep 1000"))
            ),
            Stdio(),
        ) as process:
            await line.heard()
            assert process.cgroup is not None
            await kill_all(process.cgroup)
            assert not line.is_held()
            assert not process.cgroup.is_populated()
            await kill_all(process.cgroup)
        await kill_all(process.cgroup)
