"""Commands in the machine itself that outlive their request, their connection, and the agent."""

import os
import signal
from pathlib import Path
from typing import Any

import trio

from agent.processes.cgroup import Cgroup
from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.crash import kill_agent, successor
from tests.support.execution import refusal, shell
from tests.support.lifelines import lifeline_in
from tests.support.machine import Machine, booted
from tests.support.process_tree import children
from tests.support.run_sessions import answers_to
from tests.support.watch import until
from tests.support.wire import open_wire

LOGS = "/run/innkeep/logs"
COMMANDS = "/sys/fs/cgroup/workloads/commands"
FILE_BYTES = 4 * 1024 * 1024
PATIENCE_S = 20


async def start(client: AgentClient, *command: str, **fields: Any) -> int:
    """Start a command in the background; its pid."""
    request = requests.VmExec(command=command, background=True, **fields)
    answer = await client.request(request)
    assert isinstance(answer, responses.Completed), answer
    assert answer == responses.Completed(exit_code=0, stdout=answer.stdout, stderr=b"")
    pid = int(answer.stdout.decode("ascii"))
    assert answer.stdout == str(pid).encode()
    return pid


async def start_script(client: AgentClient, script: str, **fields: Any) -> int:
    return await start(client, "sh", "-c", script, **fields)


def log_of(machine: Machine, pid: int) -> Path:
    """The directory of its log."""
    return machine.path(f"{LOGS}/{pid}")


async def ended(machine: Machine, pid: int) -> None:
    """Wait until nothing more can come into its log."""
    log = log_of(machine, pid)
    await until((log / "ended").exists, log, PATIENCE_S)


async def reaped(machine: Machine, pid: int) -> None:
    """Wait until the agent has seen its end."""
    words = f"background process {pid} ended"
    await until(lambda: words in machine.console_text(), machine.console, PATIENCE_S)


async def output_of(machine: Machine, pid: int) -> bytes:
    """Everything that it wrote, once it has ended."""
    await ended(machine, pid)
    return (log_of(machine, pid) / "output").read_bytes()


async def until_output(machine: Machine, pid: int, expected: str) -> None:
    """Wait until exactly this is in its log."""
    output = log_of(machine, pid) / "output"
    await until(output.exists, output.parent)
    await until(lambda: output.read_text() == expected, output)


def cgroups(machine: Machine) -> set[Path]:
    return {cgroup.path for cgroup in Cgroup.all_in(machine.path(COMMANDS))}


async def kill_tree(machine: Machine, client: AgentClient, pid: int) -> None:
    """Kill it and all that it has started."""
    group = (await shell(client, f"grep ^0:: /proc/{pid}/cgroup")).strip().removeprefix("0::")
    Cgroup(machine.path(f"/sys/fs/cgroup{group}")).kill()


async def test_the_answer_is_its_pid_and_it_runs(machine: Machine, client: AgentClient) -> None:
    with lifeline_in(machine) as line:
        pid = await start_script(client, line.script("echo $$; exec sleep 1000"))
        await line.heard()
        await until_output(machine, pid, f"{pid}\n")
        assert line.is_held()
        await shell(client, f"kill {pid}")
        await line.ended()
    assert await output_of(machine, pid) == f"{pid}\n".encode()


async def test_it_has_a_session_of_its_own_and_no_terminal(
    machine: Machine, client: AgentClient
) -> None:
    pid = await start(client, "cat", "/proc/self/stat")
    own, _, _, parent, group, session_id, terminal, *_ = (await output_of(machine, pid)).split()
    assert own == group == session_id == str(pid).encode()
    assert parent != b"1"
    assert terminal == b"0"


async def test_it_is_given_what_every_command_is(machine: Machine, client: AgentClient) -> None:
    env = (("A", "1"), ("A", "2"), ("TERM", "dumb"))
    pid = await start(client, "env", env=env)
    environment = dict(
        line.split("=", 1) for line in (await output_of(machine, pid)).decode().splitlines()
    )
    assert environment.pop("PATH").split(":")
    assert environment == {"HOME": "/root", "TERM": "dumb", "A": "2"}
    # Without a shell between: busybox's ignores SIGQUIT, and so does what it turns into.
    pid = await start(client, "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    assert set((await output_of(machine, pid)).split()[1::2]) == {b"0" * 16}
    pid = await start_script(
        client, "pwd; readlink /proc/self/fd/0; yes | head -n 1", workdir="/etc"
    )
    assert await output_of(machine, pid) == b"/etc\n/dev/null\ny\n"
    # 0, 1 and 2, and the directory that ls itself reads.
    pid = await start(client, "ls", "/proc/self/fd")
    assert await output_of(machine, pid) == b"0\n1\n2\n3\n"


async def test_both_streams_are_in_the_log_in_their_order(
    machine: Machine, client: AgentClient
) -> None:
    pid = await start_script(
        client, "for i in 1 2 3; do echo out $i; echo err $i >&2; done; exit 7"
    )
    assert await output_of(machine, pid) == b"out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n"


async def test_the_log_can_be_read_while_it_runs(machine: Machine, client: AgentClient) -> None:
    with lifeline_in(machine) as line:
        pid = await start_script(client, "echo so far; " + line.script("sleep 1000"))
        await line.heard()
        await until_output(machine, pid, "so far\n")
        assert await shell(client, f"cat {LOGS}/{pid}/output") == "so far\n"
        await kill_tree(machine, client, pid)
        await line.ended()
    await ended(machine, pid)
    assert await shell(client, f"cat {LOGS}/{pid}/output") == "so far\n"


async def test_the_log_keeps_the_newest_and_is_bounded(
    machine: Machine, client: AgentClient
) -> None:
    pid = await start_script(client, "seq 1 2600000; echo the end")
    await ended(machine, pid)
    log = log_of(machine, pid)
    sizes = {file.name: file.stat().st_size for file in log.glob("output*")}
    assert sizes["output.1"] == FILE_BYTES
    assert 0 < sizes["output"] <= FILE_BYTES
    assert set(sizes) == {"output", "output.1"}
    kept = (log / "output.1").read_bytes() + (log / "output").read_bytes()
    assert kept.endswith(b"\n2600000\nthe end\n")
    _, *lines = kept.decode().split("\n")[:-2]
    first = int(lines[0])
    assert lines == [str(number) for number in range(first, 2_600_001)]


async def test_it_goes_on_when_its_connection_ends(machine: Machine) -> None:
    with lifeline_in(machine) as line:
        async with open_client(machine.address) as client:
            await shell(client, "mkfifo /tmp/go")
            script = "(setsid sleep 1000 &); read go </tmp/go; echo went; exec sleep 1000"
            pid = await start_script(client, line.script(script))
            await line.heard()
        async with open_client(machine.address) as client:
            assert line.is_held()
            await shell(client, "echo >/tmp/go; rm /tmp/go")
            await until_output(machine, pid, "went\n")
            assert line.is_held()
            await kill_tree(machine, client, pid)
            await line.ended()


async def test_it_is_started_even_where_nobody_waits_for_the_answer(machine: Machine) -> None:
    async with open_client(machine.address) as client:
        await shell(client, "mkfifo /tmp/go")
        with lifeline_in(machine) as line:
            async with open_wire(machine.address) as wire:
                command = ["sh", "-c", line.script("read go </tmp/go")]
                await wire.send({"method": "vm_exec", "command": command, "background": True})
                await line.heard()
            assert line.is_held()
            await shell(client, "echo >/tmp/go; rm /tmp/go")
            await line.ended()


async def test_it_is_reaped_and_its_cgroup_removed(machine: Machine, client: AgentClient) -> None:
    before, files = cgroups(machine), machine.agents_open_files()
    of_agent = children(machine.agent_pid())
    for _ in range(10):
        pid = await start_script(client, "exit 5")
        await reaped(machine, pid)
        await ended(machine, pid)
    await until(lambda: cgroups(machine) <= before, machine.path(COMMANDS))
    assert children(machine.agent_pid()) == of_agent
    assert machine.agents_open_files() <= files + 2
    assert f"background process {pid} ended with 5" in machine.console_text()


async def test_its_time_limit_ends_the_whole_tree(machine: Machine, client: AgentClient) -> None:
    with lifeline_in(machine) as line, trio.fail_after(PATIENCE_S):
        script = line.script(
            "echo so far; (setsid sh -c 'trap \"\" TERM; sleep 1000' &) ; sleep 1000"
        )
        pid = await start_script(client, script, timeout_ms=500)
        await line.heard()
        assert line.is_held()
        await line.ended()
        assert await output_of(machine, pid) == b"so far\n"


async def test_a_time_limit_that_is_kept_changes_nothing(
    machine: Machine, client: AgentClient
) -> None:
    pid = await start_script(client, "exit 3", timeout_ms=2**63)
    await reaped(machine, pid)
    assert f"background process {pid} ended with 3" in machine.console_text()
    pid = await start_script(client, "sleep 1000", timeout_ms=0)
    await reaped(machine, pid)
    assert f"background process {pid} ended with 137" in machine.console_text()


async def test_its_input_is_empty_or_what_the_request_brings(
    machine: Machine, client: AgentClient
) -> None:
    assert await output_of(machine, await start_script(client, "cat; echo end")) == b"end\n"
    pid = await start_script(client, "cat; echo end", stdin_data="grüße\n")
    assert await output_of(machine, pid) == "grüße\nend\n".encode()
    pid = await start_script(client, "wc -c", stdin_data="x" * 5_000_000)
    assert await output_of(machine, pid) == b"5000000\n"
    pid = await start_script(client, "exec <&-; echo closed", stdin_data="x" * 5_000_000)
    assert await output_of(machine, pid) == b"closed\n"


async def test_what_cannot_be_started_is_an_error_and_leaves_nothing(
    machine: Machine, client: AgentClient
) -> None:
    await ended(machine, await start(client, "true"))
    logs, groups = set(machine.path(LOGS).iterdir()), cgroups(machine)
    files = machine.agents_open_files()
    for command in ("no-such-program", "/etc/passwd"):
        error = await refusal(client, requests.VmExec((command,), background=True))
        assert error.code == "SPAWN_FAILED"
        assert command in error.message
    error = await refusal(client, requests.VmExec((), background=True))
    assert error.code == "INVALID_REQUEST"
    assert set(machine.path(LOGS).iterdir()) <= logs
    assert machine.agents_open_files() <= files
    await until(lambda: cgroups(machine) <= groups, machine.path(COMMANDS))


async def test_interactive_beats_background(client: AgentClient) -> None:
    request = requests.VmExec(("echo", "here"), interactive=True, background=True)
    assert await answers_to(client, request) == [
        responses.Started(),
        responses.Stdout(b"here\n"),
        responses.Exited(0),
    ]


async def test_the_logs_of_those_that_ended_are_not_kept_for_ever(
    machine: Machine, client: AgentClient
) -> None:
    pids = []
    for number in range(20):
        pids.append(await start_script(client, f"echo {number}"))
        await ended(machine, pids[-1])
    logs = machine.path(LOGS)
    await until(lambda: not (logs / str(pids[0])).exists(), logs)
    for number, pid in list(enumerate(pids))[-10:]:
        assert (logs / str(pid) / "output").read_text() == f"{number}\n"


# A machine of their own


async def test_a_shutdown_asks_it_to_end(tmp_path: Path) -> None:
    with booted(tmp_path) as machine:
        with lifeline_in(machine) as line:
            async with open_client(machine.address) as client:
                farewell = "trap 'echo bye >/storage/farewell; exit' TERM"
                script = f"{farewell}; while :; do sleep 1000 & wait; done"
                await start_script(client, line.script(script))
                await line.heard()
                answer = await client.request(requests.Shutdown())
                assert answer == responses.Ok({"shutdown": True})
            assert not line.is_held()
        assert await trio.to_thread.run_sync(machine.wait) == 0
        assert (machine.storage / "farewell").read_text() == "bye\n"


async def test_the_agents_death_costs_its_log_no_line(tmp_path: Path) -> None:
    with booted(tmp_path) as machine:
        for _ in range(4):
            agent, serving = machine.agent_pid(), successor(machine)
            async with open_client(machine.address) as client:
                # At full speed: when the agent dies it has some of it in its hands.
                pid = await start(client, "seq", "1", "600000")
                log = log_of(machine, pid)
                await until((log / "output").exists, log)
                os.kill(agent, signal.SIGKILL)
            await serving()
            await ended(machine, pid)
            files = sorted(log.glob("output*"), reverse=True)
            written = b"".join(file.read_bytes() for file in files).split()
            assert written == [b"%d" % number for number in range(1, 600_001)]


async def test_it_goes_on_through_the_agents_deaths_and_is_cleaned_up_after(
    tmp_path: Path,
) -> None:
    count = "i=0; trap 'stop=1' USR1; until [ $stop ]; do echo $i; i=$((i + 1)); done; echo end"
    with booted(tmp_path) as machine, lifeline_in(machine) as line:
        async with open_client(machine.address) as client:
            pid = await start_script(client, line.script(count))
            await line.heard()
        for _ in range(3):
            await kill_agent(machine)
            assert line.is_held()
            await grown(log_of(machine, pid))
        async with open_client(machine.address) as client:
            await shell(client, f"kill -USR1 {pid}")
        await line.ended()
        await ended(machine, pid)
        files = sorted(log_of(machine, pid).glob("output*"), reverse=True)
        lines = b"".join(file.read_bytes() for file in files).decode().split("\n")
        # The oldest file may begin in the middle of a line.
        assert len(files) == 2 or lines[0] == "0"
        assert lines[-2:] == ["end", ""]
        first = int(lines[1])
        assert lines[1:-2] == [str(first + n) for n in range(len(lines) - 3)]
        await until(lambda: cgroups(machine) == set(), machine.path(COMMANDS))
        await no_zombies(machine)


async def test_its_time_limit_and_its_end_by_shutdown_hold_after_the_agents_death(
    tmp_path: Path,
) -> None:
    with (
        booted(tmp_path) as machine,
        lifeline_in(machine) as limited,
        lifeline_in(machine) as unlimited,
    ):
        async with open_client(machine.address) as client:
            for line, timeout_ms in ((limited, 1500), (unlimited, None)):
                script = line.script("(setsid sleep 1000 &); sleep 1000")
                await start_script(client, script, timeout_ms=timeout_ms)
                await line.heard()
        await kill_agent(machine)
        assert unlimited.is_held()
        with trio.fail_after(PATIENCE_S):
            await limited.ended()
        assert unlimited.is_held()
        async with open_client(machine.address) as client:
            answer = await client.request(requests.Shutdown())
            assert answer == responses.Ok({"shutdown": True})
        assert not unlimited.is_held()


async def test_what_a_command_left_behind_outlives_the_agent_and_can_go_on_writing(
    tmp_path: Path,
) -> None:
    with (
        booted(tmp_path) as machine,
        lifeline_in(machine) as plain,
        lifeline_in(machine) as interactive,
    ):
        async with open_client(machine.address) as client:
            await shell(client, "mkfifo /tmp/go-plain /tmp/go-interactive")
            # More than any pipe holds, to both; a closed one would end it before it says so.
            later = "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2; printf . >&9"
            for line, name in ((plain, "plain"), (interactive, "interactive")):
                script = line.script(f"(read go </tmp/go-{name}; {later}; exec sleep 1000) &")
                request = requests.VmExec(("sh", "-c", script), interactive=name == "interactive")
                answer = await client.request(request)
                assert isinstance(answer, (responses.Completed, responses.Exited))
                await line.heard()
        await kill_agent(machine)
        async with open_client(machine.address) as client:
            for line, name in ((plain, "plain"), (interactive, "interactive")):
                assert line.is_held()
                await shell(client, f"echo >/tmp/go-{name}")
                with trio.fail_after(PATIENCE_S):
                    await line.heard()
                assert line.is_held()
            for cgroup in cgroups(machine):
                Cgroup(cgroup).kill()
        for line in (plain, interactive):
            await line.ended()
        await until(lambda: cgroups(machine) == set(), machine.path(COMMANDS))
        await no_zombies(machine)


async def test_what_ran_in_the_foreground_ends_with_the_agent(tmp_path: Path) -> None:
    kinds = [{}, {"interactive": True}, {"tty": True}]
    with (
        booted(tmp_path) as machine,
        lifeline_in(machine) as first,
        lifeline_in(machine) as second,
        lifeline_in(machine) as third,
    ):
        lines = (first, second, third)
        async with trio.open_nursery() as nursery:
            for line, fields in zip(lines, kinds, strict=True):
                client = await nursery.start(connected, machine)
                script = line.script(
                    "(setsid sh -c 'trap \"\" TERM HUP; sleep 1000' &); sleep 1000"
                )
                await client.send(requests.VmExec(("sh", "-c", script), **fields))
                await line.heard()
            await kill_agent(machine)
            nursery.cancel_scope.cancel()
        with trio.fail_after(PATIENCE_S):
            for line in lines:
                await line.ended()
        await until(lambda: cgroups(machine) == set(), machine.path(COMMANDS))
        await no_zombies(machine)


async def connected(machine: Machine, task_status: trio.TaskStatus[AgentClient]) -> None:
    """A client, until this is cancelled."""
    async with open_client(machine.address) as client:
        task_status.started(client)
        await trio.sleep_forever()


async def grown(log: Path) -> None:
    """Wait until something more has come into a log."""

    def state() -> tuple[int, int] | None:
        try:
            status = (log / "output").stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size

    before = state()
    await until(lambda: state() != before, log)


async def no_zombies(machine: Machine) -> None:
    """Wait until init has reaped what ended: it does so at once, and tells nobody."""
    async with open_client(machine.address) as client:
        with trio.fail_after(PATIENCE_S):
            while await shell(client, "grep -l '^State:.Z' /proc/[0-9]*/status 2>&1 || true"):
                pass
