"""What commands leave behind: it lives on, its pipes are emptied, and shutdown ends it."""

import os
import signal
from pathlib import Path

import pytest
import trio

from agent.processes.cgroup import Cgroup, CgroupTree
from agent.processes.command import Command
from agent.processes.drain import new_turns
from agent.processes.oom_protection import OomProtection
from agent.processes.process import Stdio, start_process
from agent.processes.service import Processes, open_processes
from tests.support.lifelines import lifeline
from tests.support.watch import until

PATIENCE_S = 20


async def leave_behind(processes: Processes, script: str) -> None:
    """Run a shell script that ends by itself."""
    collected = await processes.execute(Command.from_request(("sh", "-c", script)))
    assert collected.exit_code == 0, collected


def commands_of(processes: Processes) -> list[Cgroup]:
    assert processes.tree is not None
    return Cgroup.all_in(processes.tree.commands)


async def test_what_a_command_leaves_behind_can_write_for_ever(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line, trio.fail_after(PATIENCE_S):
        # More than any pipe holds, to both; a closed pipe would end it before it says so.
        later = "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2; printf . >&9; sleep 1000"
        await leave_behind(processes, f"exec 9>{line.path}; ({later}) &")
        await line.heard()
        assert line.is_held()


async def test_its_cgroup_goes_when_it_ends(processes: Processes, tmp_path: Path) -> None:
    go = tmp_path / "go"
    (tmp_path / "first").mkdir()
    with lifeline(tmp_path / "first") as line, trio.fail_after(PATIENCE_S):
        script = line.script(f"(mkfifo {go}; printf . >&9; read word <{go}) &")
        await leave_behind(processes, script)
        await line.heard()
        await line.heard()
        (cgroup,) = commands_of(processes)
        await trio.to_thread.run_sync(go.write_text, "go\n")
        await line.ended()
        await until(lambda: commands_of(processes) == [], cgroup.path.parent)


async def test_what_closed_its_pipes_is_left_alone_too(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line, trio.fail_after(PATIENCE_S):
        script = line.script("setsid sleep 1000 >/dev/null 2>&1 &")
        await leave_behind(processes, script)
        await line.heard()
        assert line.is_held()
        assert len(commands_of(processes)) == 1


async def test_stopping_asks_before_it_kills(processes: Processes, tmp_path: Path) -> None:
    farewell = tmp_path / "farewell"
    with lifeline(tmp_path) as line, trio.fail_after(PATIENCE_S):
        polite = f"trap 'echo bye >{farewell}; exit' TERM; printf . >&9; while :; do :; done"
        await leave_behind(processes, f"exec 9>{line.path}; ({polite}) >/dev/null 2>&1 &")
        await line.heard()
        before = trio.current_time()
        await processes.stop_all(grace_s=10)
        assert trio.current_time() - before < 5
        assert farewell.read_text() == "bye\n"
        assert not line.is_held()


async def test_stopping_kills_what_does_not_want_to_go(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line, trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as connection:
            stubborn = "trap '' TERM; " + line.script("setsid sleep 1000 & sleep 1000")
            connection.start_soon(leave_to_be_killed, processes, stubborn)
            await line.heard()
            await processes.stop_all(grace_s=0.2)
            assert not line.is_held()


async def leave_to_be_killed(processes: Processes, script: str) -> None:
    collected = await processes.execute(Command.from_request(("sh", "-c", script)))
    assert collected.exit_code == 128 + signal.SIGKILL


async def test_stopping_nothing_takes_no_time(processes: Processes) -> None:
    before = trio.current_time()
    await processes.stop_all(grace_s=10)
    assert trio.current_time() - before < 1


async def test_an_agent_that_starts_again_keeps_what_outlived_its_request_and_ends_the_rest(
    cgroup_root: Path, tmp_path: Path
) -> None:
    tree = CgroupTree.open(cgroup_root)
    names = ("kept", "foreground", "container")
    for name in names:
        (tmp_path / name).mkdir()
    with (
        lifeline(tmp_path / "kept") as kept,
        lifeline(tmp_path / "foreground") as foreground,
        lifeline(tmp_path / "container") as container,
        trio.fail_after(PATIENCE_S),
    ):
        orphans = {}
        for name, line in zip(names, (kept, foreground, container), strict=True):
            cgroup = Cgroup.make(tree.containers if name == "container" else tree.commands)
            os.mkfifo(tmp_path / name / "go")
            later = "read word <$0; head -c 1000000 /dev/zero; printf . >&9; sleep 1000"
            command = Command.from_request(
                ("sh", "-c", line.script(later), f"{tmp_path / name}/go")
            )
            orphans[name] = start_process(command, Stdio(), cgroup, new_turns(), OomProtection())
            await line.heard()
        cgroup_of_kept = orphans["kept"].cgroup
        assert cgroup_of_kept is not None
        cgroup_of_kept.keep()
        # The agent that read what they write is gone. Nobody dies of that who writes meanwhile.
        for orphan in orphans.values():
            orphan.close_outputs()
        (tmp_path / "kept" / "go").write_text("go\n")
        async with open_processes(cgroup_root, tmp_path / "logs") as processes:
            for name, line in (("foreground", foreground), ("container", container)):
                await line.ended()
                await orphans[name].wait()
            await until(lambda: Cgroup.all_in(tree.containers) == [], tree.containers)
            await kept.heard()
            assert kept.is_held()
            assert Cgroup.all_in(tree.commands) == [cgroup_of_kept]
            await processes.stop_all(grace_s=1)
            assert not kept.is_held()
            await orphans["kept"].wait()
            await until(lambda: Cgroup.all_in(tree.commands) == [], tree.commands)
        for orphan in orphans.values():
            orphan.close()


async def test_a_cgroup_root_that_is_none_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_processes(tmp_path, tmp_path / "logs") as processes:
        assert processes.tree is None
    assert "commands have no cgroups" in caplog.text
