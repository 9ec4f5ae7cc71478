"""Commands in the machine itself, without a container."""

import time
from typing import Any

import pytest
import trio

from agent.processes.cgroup import Cgroup
from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import execute, lifeline, refusal, shell
from tests.support.lifelines import lifeline_in
from tests.support.machine import Machine
from tests.support.rounds import rounds
from tests.support.watch import until
from tests.support.wire import open_wire

STREAM_LIMIT = 11 * 1024 * 1024


async def test_status_output_and_error_output_come_back(client: AgentClient) -> None:
    done = await execute(client, "sh", "-c", "echo out; echo err >&2; exit 42")
    assert done == responses.Completed(exit_code=42, stdout=b"out\n", stderr=b"err\n")


@pytest.mark.parametrize(("signal", "code"), [("TERM", 143), ("KILL", 137), ("SEGV", 139)])
async def test_death_by_a_signal_is_128_and_its_number(
    client: AgentClient, signal: str, code: int
) -> None:
    done = await execute(client, "sh", "-c", f"kill -{signal} $$")
    assert done.exit_code == code


async def test_arguments_arrive_as_they_are_without_a_shell(client: AgentClient) -> None:
    words = ("$HOME", "a b", "*", "", "größe", "new\nline", "'\"")
    done = await execute(client, "printf", "<%s>", *words)
    assert done.stdout.decode() == "".join(f"<{word}>" for word in words)


async def test_output_is_binary_safe(client: AgentClient) -> None:
    done = await execute(client, "printf", r"\000\377\r\n\200")
    assert done.stdout == b"\x00\xff\r\n\x80"


async def test_the_environment_is_the_agents_default_and_the_requests(client: AgentClient) -> None:
    done = await execute(client, "env", env=(("A", "1"), ("TERM", "dumb"), ("A", "2")))
    environment = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert environment.pop("PATH").split(":")
    assert environment == {"HOME": "/root", "TERM": "dumb", "A": "2"}


async def test_commands_are_found_on_the_path_of_the_request(client: AgentClient) -> None:
    await shell(client, "mkdir -p /tmp/own; printf '#!/bin/sh\\necho mine' >/tmp/own/mine")
    await shell(client, "chmod 755 /tmp/own/mine")
    done = await execute(client, "mine", env=(("PATH", "/tmp/own:/bin:/usr/bin"),))
    assert done.stdout == b"mine\n"


async def test_the_working_directory_is_the_root_or_the_requests(client: AgentClient) -> None:
    assert (await execute(client, "pwd")).stdout == b"/\n"
    assert (await execute(client, "pwd", workdir="/etc")).stdout == b"/etc\n"


async def test_it_runs_as_root_in_the_machine_itself(machine: Machine, client: AgentClient) -> None:
    done = await execute(client, "id", "-u")
    assert done.stdout == b"0\n"
    namespaces = [machine.path(f"/proc/1/ns/{kind}").readlink() for kind in ("pid", "mnt", "net")]
    done = await execute(
        client, "sh", "-c", "for n in pid mnt net; do readlink /proc/self/ns/$n; done"
    )
    assert done.stdout.decode().split() == list(map(str, namespaces))


async def test_stdin_is_empty_or_what_the_request_brings(client: AgentClient) -> None:
    assert (await execute(client, "cat")).stdout == b""
    done = await execute(client, "readlink", "/proc/self/fd/0")
    assert done.stdout == b"/dev/null\n"
    assert (await execute(client, "cat", stdin_data="")).stdout == b""
    assert (await execute(client, "cat", stdin_data="grüße\0\n")).stdout == "grüße\0\n".encode()


async def test_stdin_and_output_of_megabytes_pass_each_other(client: AgentClient) -> None:
    data = "0123456789abcdef" * (10 << 16)
    assert (await execute(client, "cat", stdin_data=data)).stdout == data.encode()


@pytest.mark.parametrize(
    ("script", "output"),
    [("echo done", b"done\n"), ("exec <&-; echo done", b"done\n"), ("head -c 3", b"xxx")],
)
async def test_stdin_that_is_not_read_holds_nothing_up(
    client: AgentClient, script: str, output: bytes
) -> None:
    with trio.fail_after(10):
        done = await execute(client, "sh", "-c", script, stdin_data="x" * 10_000_000)
    assert (done.exit_code, done.stdout) == (0, output)


async def test_signals_have_their_default_effect(client: AgentClient) -> None:
    """CPython ignores SIGPIPE; a child that inherited that would never end here."""
    with trio.fail_after(10):
        assert await shell(client, "yes | head -n 1") == "y\n"
    # Without a shell between: busybox's ignores SIGQUIT, and so does what it turns into.
    status = await execute(client, "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    assert set(status.stdout.split()[1::2]) == {b"0" * 16}


async def test_the_usual_tools_of_hosts_scripts_are_there(client: AgentClient) -> None:
    for tool in ("/bin/sh", "tar", "cp", "mount", "umount", "awk", "chroot", "sed", "mkfs.ext4"):
        assert await shell(client, f"command -v {tool}")


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("no-such-program", "not found"),
        ("/no/such/program", "not found"),
        ("/etc/passwd", "not executable"),
        ("/etc", "directory"),
        ("/tmp/bad-interpreter", "interpreter"),
    ],
)
async def test_what_cannot_be_started_is_an_error_at_once(
    client: AgentClient, command: str, cause: str
) -> None:
    await shell(client, "printf '#!/no/such/thing\\n' >/tmp/bad-interpreter")
    await shell(client, "chmod 755 /tmp/bad-interpreter")
    error = await refusal(client, requests.VmExec(command=(command,)))
    assert error.code == "SPAWN_FAILED"
    assert command in error.message
    assert cause in error.message


async def test_a_missing_working_directory_is_an_error_that_names_it(client: AgentClient) -> None:
    error = await refusal(client, requests.VmExec(command=("true",), workdir="/no/such/place"))
    assert error.code == "SPAWN_FAILED"
    assert "/no/such/place" in error.message


async def test_no_command_is_an_invalid_request(client: AgentClient) -> None:
    error = await refusal(client, requests.VmExec(command=()))
    assert error.code == "INVALID_REQUEST"


async def test_a_time_limit_ends_the_whole_tree_with_124(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        script = line.script("echo so far; (setsid sleep 1000 &) ; sleep 1000")
        done = await execute(client, "sh", "-c", script, timeout_ms=500)
        assert (done.exit_code, done.stdout) == (124, b"so far\n")
        with trio.fail_after(5):
            await line.ended()


async def test_a_time_limit_of_nothing_ends_at_once(client: AgentClient) -> None:
    with trio.fail_after(2):
        done = await execute(client, "sleep", "1000", timeout_ms=0)
    assert done.exit_code == 124


async def test_a_time_limit_that_is_kept_changes_nothing(client: AgentClient) -> None:
    done = await execute(client, "sh", "-c", "exit 3", timeout_ms=60_000)
    assert done.exit_code == 3


async def test_a_child_that_holds_the_output_open_delays_nothing(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        begun = time.monotonic()
        script = line.script("sh -c 'sleep 1; echo late' & echo done")
        done = await execute(client, "sh", "-c", script)
        assert time.monotonic() - begun < 0.6
        assert (done.exit_code, done.stdout) == (0, b"done\n")
        # It lives on: what it writes later is read by the agent and dropped, without SIGPIPE.
        with trio.fail_after(5):
            await line.ended()


async def test_what_a_command_leaves_behind_outlives_its_connection_and_its_time_limit(
    machine: Machine, client: AgentClient
) -> None:
    with lifeline_in(machine) as line:
        async with open_client(machine.address) as other:
            script = line.script("(setsid sleep 1000 &) ; sleep 1000 & echo $!")
            done = await execute(other, "sh", "-c", script, timeout_ms=1000)
            assert done.exit_code == 0
            await line.heard()
            group = await shell(client, f"grep ^0:: /proc/{done.stdout.decode().strip()}/cgroup")
        cgroup = machine.path("/sys/fs/cgroup" + group.strip().removeprefix("0::"))
        # Longer than the limit, which was the command's.
        await shell(client, "sleep 1.5")
        assert line.is_held()
        Cgroup(cgroup).kill()
        await line.ended()
        await until(lambda: not cgroup.exists(), cgroup.parent)


async def test_more_output_than_any_pipe_holds_is_complete(client: AgentClient) -> None:
    script = "head -c 5000000 /dev/zero; head -c 3000000 /dev/zero >&2"
    done = await execute(client, "sh", "-c", script)
    assert (len(done.stdout), len(done.stderr)) == (5_000_000, 3_000_000)
    assert not done.stdout_truncated


async def test_output_beyond_a_frame_keeps_its_head_and_says_so(client: AgentClient) -> None:
    script = f"head -c {STREAM_LIMIT} /dev/zero; echo beyond; head -c 9000000 /dev/zero; exit 7"
    done = await execute(client, "sh", "-c", script)
    assert done.exit_code == 7
    assert done.stdout == bytes(STREAM_LIMIT)
    assert done.stdout_truncated
    assert not done.stderr_truncated
    assert done.stderr.endswith(b"\n")
    assert b"truncated" in done.stderr


async def test_both_streams_full_fit_one_frame(client: AgentClient) -> None:
    script = f"head -c {STREAM_LIMIT} /dev/zero; head -c {STREAM_LIMIT} /dev/zero >&2"
    done = await execute(client, "sh", "-c", script)
    assert (len(done.stdout), len(done.stderr)) == (STREAM_LIMIT, STREAM_LIMIT)
    assert not done.stdout_truncated
    assert not done.stderr_truncated


async def test_commands_on_many_connections_run_at_once(machine: Machine) -> None:
    begun = time.monotonic()
    async with trio.open_nursery() as nursery:

        async def sleep() -> None:
            async with open_client(machine.address) as client:
                assert (await execute(client, "sleep", "1")).exit_code == 0

        for _ in range(20):
            nursery.start_soon(sleep)
    assert time.monotonic() - begun < 5


async def test_nothing_of_many_commands_stays_behind(machine: Machine) -> None:
    async with open_client(machine.address) as client:
        for _ in range(20):
            await execute(client, "sh", "-c", "echo x; exit 1")
        files, memory = machine.agents_open_files(), machine.agents_memory_bytes()
        groups = await shell(client, "find /sys/fs/cgroup -type d | wc -l")
        for _ in range(rounds(100, 10_000)):
            await execute(client, "sh", "-c", "echo x; exit 1")
        assert machine.agents_open_files() <= files + 2
        assert machine.agents_memory_bytes() < memory + (8 << 20)
        assert await shell(client, "find /sys/fs/cgroup -type d | wc -l") == groups


async def test_orphans_are_reaped_by_init(client: AgentClient) -> None:
    await shell(client, "(setsid sh -c 'exit 0' &) ; (sleep 0.1 &)")
    await shell(client, "sleep 0.3")
    zombies = await shell(client, "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || true")
    assert zombies == ""


# What a command took


async def test_the_agent_announces_that_it_counts(client: AgentClient) -> None:
    answer = await client.request(requests.Ping())
    assert isinstance(answer, responses.Pong)
    assert "process-stats-v1" in (answer.capabilities or ())


@pytest.mark.parametrize("fields", [{}, {"interactive": True}, {"tty": True}], ids=str)
async def test_the_end_tells_time_and_processor_time(
    client: AgentClient, fields: dict[str, bool]
) -> None:
    done = await last_answer(client, "sleep 0.3", **fields)
    assert 300 <= done.duration_ms < 3000
    assert 0 < done.cpu_us < 200_000
    # Also that of children, and of theirs.
    busy = "i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done"
    done = await last_answer(client, f"(({busy}) & ({busy}); wait)", **fields)
    assert 100_000 < done.cpu_us < 2 * 1000 * done.duration_ms + 50_000


@pytest.mark.parametrize("fields", [{}, {"interactive": True}, {"tty": True}], ids=str)
async def test_the_end_tells_the_most_memory_that_was_held(
    client: AgentClient, fields: dict[str, bool]
) -> None:
    script = "python3 -c 'x = bytearray(200 << 20)'; exit 3"
    done = await last_answer(client, script, **fields)
    assert done.exit_code == 3
    assert 200 << 20 <= done.peak_memory_bytes < 300 << 20


@pytest.mark.parametrize("fields", [{}, {"interactive": True}, {"tty": True}], ids=str)
async def test_the_end_tells_the_signal_or_the_time_limit_and_nothing_that_was_not(
    machine: Machine, fields: dict[str, bool]
) -> None:
    async with open_wire(machine.address) as wire:

        async def end_of(script: str, **more: object) -> dict[str, object]:
            await wire.send(
                {"method": "vm_exec", "command": ["sh", "-c", script], **fields, **more}
            )
            while (answer := await wire.receive()) is not None:
                if answer["status"] not in ("started", "stdout", "stderr"):
                    break
            assert answer is not None
            assert answer.pop("status") == ("exited" if fields else "completed")
            measured = {"duration_ms", "cpu_us", "peak_memory_bytes", "stdout", "stderr"}
            return {key: value for key, value in answer.items() if key not in measured}

        assert await end_of("exit 0") == {"exit_code": 0}
        assert await end_of("exit 255") == {"exit_code": 255}
        assert await end_of("kill -KILL $$") == {"exit_code": 137, "signal": 9}
        # The shell's own status, by which it tells of its child.
        assert await end_of("sh -c 'kill -KILL $$'; exit $?") == {"exit_code": 137}
        timed_out = {"exit_code": 124, "timed_out": True}
        assert await end_of("sleep 1000", timeout_ms=100) == timed_out
        assert await end_of("exit 124", timeout_ms=60_000) == {"exit_code": 124}


async def last_answer(client: AgentClient, script: str, **fields: bool) -> Any:
    """What tells the end of a shell script."""
    request = requests.VmExec(("sh", "-c", script), **fields)
    done = await client.request(request)
    assert isinstance(done, (responses.Completed, responses.Exited)), done
    assert done.oom is None
    return done
