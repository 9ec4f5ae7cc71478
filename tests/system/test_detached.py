"""What goes on in a container that stays: detached, or in the background."""

import re

import pytest
import trio

from protocol import responses
from protocol.client import open_client
from tests.support.execution import shell
from tests.support.run_sessions import session
from tests.support.standing import (
    INIT,
    Persistent,
    cgroup_of_container,
    end_container,
    first_process,
    leftovers,
    output_of,
    settled,
    whole_output,
)
from tests.support.watch import until

PATIENCE_S = 20


# Detached: a container of its own


async def test_a_detached_command_is_the_first_process_of_the_container_that_is_named(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as line:
        container_id = await persistent.detach(line.script("exec sleep 1000"))
        await line.started()
        # Not to be taken for a process's number.
        assert re.fullmatch("[0-9a-f]{32}", container_id)
        assert not container_id.isdecimal()
        assert persistent.containers() == [container_id]
        assert (await first_process(persistent)).endswith("sleep 1000")


async def test_a_detached_command_takes_the_place_of_a_container_that_only_waits(
    persistent: Persistent,
) -> None:
    await persistent.shell("echo kept >/note")
    (idle,) = persistent.containers()
    async with persistent.lifeline() as line:
        container_id = await persistent.detach(line.script("exec sleep 1000"))
        await line.started()
        assert persistent.containers() == [container_id]
        assert cgroup_of_container(persistent.machine, idle).pids() == []
        assert (await first_process(persistent)).endswith("sleep 1000")
        assert await persistent.shell("cat /note") == "kept\n"


async def test_a_container_in_which_something_runs_is_not_replaced(persistent: Persistent) -> None:
    async with persistent.lifeline() as left, persistent.lifeline() as line:
        await persistent.shell(left.script("sleep 1000 &"))
        (first,) = persistent.containers()
        second = await persistent.detach(line.script("exec sleep 2000"))
        await line.started()
        assert set(persistent.containers()) == {first, second}
        assert "sleep 1000" not in await persistent.shell("ps")
        await end_container(persistent.machine, second)
        assert "sleep 1000" in await persistent.shell("ps")


async def test_beside_a_workload_a_new_container_on_the_same_overlay_is_the_one_that_is_joined(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as old, persistent.lifeline() as new:
        first = await persistent.detach(old.script("echo first >/note; exec sleep 1000"))
        await old.started()
        second = await persistent.detach(new.script("exec sleep 2000"))
        await new.started()
        assert first != second
        assert (await first_process(persistent)).endswith("sleep 2000")
        assert await persistent.shell("cat /note") == "first\n"
        # The first goes on.
        assert set(persistent.containers()) == {first, second}


async def test_when_the_newest_container_has_ended_the_one_before_is_joined_and_then_a_new_one(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as old, persistent.lifeline() as new:
        await persistent.detach(old.script("mkfifo /old; read word </old"))
        await old.started()
        await persistent.detach(new.script("mkfifo /new; read word </new"))
        await new.started()
        assert "read word </new" in await first_process(persistent)
        await persistent.run("sh", "-c", "echo end >/new")
        await new.ended()
        assert "read word </old" in await first_process(persistent)
        await persistent.run("sh", "-c", "echo end >/old")
        await old.ended()
        assert await first_process(persistent) == f"{INIT} -P"


async def test_a_container_whose_first_process_has_exited_is_never_joined(
    persistent: Persistent,
) -> None:
    for _ in range(10):
        async with persistent.lifeline() as line:
            await persistent.detach(f"trap 'exit 3' TERM; {line.script('sleep 1000 & wait')}")
            await line.started()
            # Its end takes all others with it, the one included that asks for it.
            assert (await persistent.run("sh", "-c", "kill 1; exec sleep 1000")).exit_code == 137
            assert await first_process(persistent) == f"{INIT} -P"


async def test_a_detached_command_may_end_at_once(persistent: Persistent) -> None:
    machine = persistent.machine
    for _ in range(10):
        container_id = await persistent.detach("echo done")
        assert await whole_output(machine, container_id) == b"done\n"
    await settled(machine)
    files = machine.agents_open_files()
    for _ in range(20):
        await persistent.detach("exit 3")
    await settled(machine)
    assert machine.agents_open_files() <= files + 2


async def test_the_output_of_a_detached_command_is_in_a_bounded_log(
    persistent: Persistent,
) -> None:
    script = "echo begun; echo error >&2; read go </go; yes | head -c 20000000; echo end"
    await persistent.run("mkfifo", "/go")
    container_id = await persistent.detach(script)
    output = output_of(persistent.machine, container_id)
    await until(output.exists, output.parent)
    await until(lambda: output.read_bytes() == b"begun\nerror\n", output)
    await persistent.shell("echo >/go")
    kept = await whole_output(persistent.machine, container_id)
    assert kept.endswith(b"y\nend\n")
    assert 4 << 20 <= len(kept) <= 8 << 20
    assert sum(file.stat().st_size for file in output.parent.iterdir()) <= 8 << 20


async def test_a_detached_container_goes_on_when_its_host_hangs_up(persistent: Persistent) -> None:
    async with persistent.lifeline() as line:
        async with open_client(persistent.machine.address) as other:
            script = line.script("mkfifo /go; read word </go; echo $word >/word")
            request = persistent.request("sh", "-c", script, detached=True)
            assert isinstance(await other.request(request), responses.Completed)
            await line.started()
        await persistent.run("sh", "-c", "echo on and on >/go")
        with trio.fail_after(PATIENCE_S):
            await line.ended()
    # Its overlay is kept.
    assert await persistent.shell("cat /word") == "on and on\n"


async def test_a_detached_command_that_cannot_start_leaves_no_container(
    persistent: Persistent,
) -> None:
    await persistent.shell("printf '#!/no/such/shell\\n' >/script; chmod 755 /script")
    await persistent.end()
    await settled(persistent.machine)
    before = await leftovers(persistent.client)
    for command, cause in (
        ("no-such-program", "not found"),
        ("/etc/passwd", "not executable"),
        ("/script", "bad interpreter: '/no/such/shell'"),
    ):
        error = await persistent.refusal(command, detached=True)
        assert error.code == "RUN_FAILED"
        assert command in error.message
        assert cause in error.message
    await settled(persistent.machine)
    assert await leftovers(persistent.client) == before
    assert await first_process(persistent) == f"{INIT} -P"


# In the background


async def test_a_background_commands_pid_is_the_one_that_the_machine_sees(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as line:
        pid = await persistent.background(line.script("exec sleep 1000"))
        await line.started()
        seen = await shell(persistent.client, f"tr '\\0' ' ' </proc/{pid}/cmdline")
        assert seen.endswith("sleep 1000 ")
        assert "sleep 1000" in await persistent.shell("ps")
        assert await first_process(persistent) == f"{INIT} -P"
        await shell(persistent.client, f"kill {pid}")
        with trio.fail_after(PATIENCE_S):
            await line.ended()


async def test_a_background_commands_output_is_in_a_log_of_its_pid(persistent: Persistent) -> None:
    pid = await persistent.background("cat; echo error >&2; exit 3", stdin_data="input\n")
    assert await whole_output(persistent.machine, pid) == b"input\nerror\n"


async def test_a_background_command_without_input_reads_nothing(persistent: Persistent) -> None:
    pid = await persistent.background("readlink /proc/self/fd/0; cat; echo end")
    assert await whole_output(persistent.machine, pid) == b"/dev/null\nend\n"


async def test_a_background_commands_time_limit_is_for_its_whole_tree_and_nothing_else(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as limited, persistent.lifeline() as other:
        await persistent.background(other.script("exec sleep 1000"))
        await other.started()
        script = limited.script("(setsid sleep 1000 &); exec sleep 1000")
        await persistent.background(script, timeout_ms=300)
        with trio.fail_after(PATIENCE_S):
            await limited.ended()
        assert (await persistent.shell("ps")).count("sleep 1000") == 1


async def test_a_background_command_goes_on_when_its_host_hangs_up(persistent: Persistent) -> None:
    async with persistent.lifeline() as line:
        await persistent.run("mkfifo", "/go")
        async with open_client(persistent.machine.address) as other:
            script = line.script("read word </go; echo $word")
            answer = await other.request(persistent.request("sh", "-c", script, background=True))
            assert isinstance(answer, responses.Completed)
            await line.started()
        await persistent.shell("echo on and on >/go")
        assert await whole_output(persistent.machine, int(answer.stdout)) == b"on and on\n"


async def test_a_background_command_that_cannot_start_is_an_error_and_has_no_log(
    persistent: Persistent,
) -> None:
    await persistent.run("true")
    logs = await shell(persistent.client, "ls /run/innkeep/logs")
    error = await persistent.refusal("no-such-program", background=True)
    assert (error.code, "no-such-program" in error.message) == ("RUN_FAILED", True)
    assert await shell(persistent.client, "ls /run/innkeep/logs") == logs


@pytest.mark.parametrize("mode", ["detached", "background"])
async def test_what_outlives_its_request_needs_an_overlay_that_does(
    persistent: Persistent, mode: str
) -> None:
    fields = {mode: True, "persistent_overlay_id": None}
    error = await persistent.refusal("touch", "/workspace/should-not-be", **fields)
    assert error.code == "INVALID_REQUEST"
    assert "persistent_overlay_id" in error.message
    assert not (persistent.machine.storage / "workspace" / "should-not-be").exists()


@pytest.mark.parametrize("mode", ["interactive", "tty"])
@pytest.mark.parametrize("kept", [True, False], ids=["persistent", "ephemeral"])
async def test_a_session_comes_before_detached_and_background(
    persistent: Persistent, mode: str, kept: bool
) -> None:
    fields = {mode: True, "detached": True, "background": True}
    overlay_id = persistent.id if kept else None
    request = persistent.request("echo", "hello", persistent_overlay_id=overlay_id, **fields)
    async with session(persistent.machine.address, request) as talk:
        assert (await talk.exited()).exit_code == 0
    assert talk.stdout.split() == [b"hello"]


async def test_detached_comes_before_background(persistent: Persistent) -> None:
    container_id = await persistent.detach("echo hello", background=True)
    assert re.fullmatch("[0-9a-f]{32}", container_id)
    assert await whole_output(persistent.machine, container_id) == b"hello\n"
