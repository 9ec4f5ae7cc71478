"""Plain commands in the VM: what they are given, what comes back, and that they end."""

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from agent.errors import AgentError
from agent.processes.collect import OUTPUT_LIMIT_BYTES, Collected
from agent.processes.command import Command
from agent.processes.outcome import Outcome
from agent.processes.service import Processes, open_processes
from protocol.errors import ErrorCode
from tests.support.lifelines import lifeline
from tests.support.process_tree import children

MIB = 1024 * 1024

# Nothing here takes longer unless it hangs.
PATIENCE_S = 20


async def sh(
    processes: Processes,
    script: str,
    *,
    env: tuple[tuple[str, str], ...] = (),
    workdir: str | None = None,
    stdin_data: str | None = None,
    timeout_s: float | None = None,
) -> Collected:
    """Run a shell script as a command."""
    command = Command.from_request(("sh", "-c", script), env, workdir)
    with trio.fail_after(PATIENCE_S):
        return await processes.execute(command, stdin_data=stdin_data, timeout_s=timeout_s)


async def refusal(processes: Processes, *argv: str, workdir: str | None = None) -> str:
    """The message of the SPAWN_FAILED that a command must end in."""
    with pytest.raises(AgentError) as raised:
        await processes.execute(Command.from_request(argv, workdir=workdir))
    assert raised.value.code is ErrorCode.SPAWN_FAILED
    return raised.value.message


async def test_the_exit_code_is_the_commands_own(processes: Processes) -> None:
    assert await sh(processes, "echo out; echo err >&2; exit 7") == Collected(
        Outcome(exit_code=7), b"out\n", b"err\n"
    )
    assert (await sh(processes, "exit 0")).exit_code == 0
    assert (await sh(processes, "exit 255")).exit_code == 255


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
async def test_a_signals_exit_code_is_128_and_its_number(
    processes: Processes, number: signal.Signals
) -> None:
    assert (await sh(processes, f"kill -{int(number)} $$")).exit_code == 128 + number


async def test_the_environment_is_roots_and_the_requests_and_nothing_of_the_agents(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_AGENT", "1")
    env = (("A", "first"), ("A", "last"), ("TERM", "dumb"), ("EMPTY", ""))
    command = Command.from_request(("cat", "/proc/self/environ"), env)
    collected = await processes.execute(command)
    assert sorted(collected.stdout.decode().removesuffix("\0").split("\0")) == [
        "A=last",
        "EMPTY=",
        "HOME=/root",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TERM=dumb",
    ]


async def test_the_program_is_found_on_the_path_of_the_request(
    processes: Processes, tmp_path: Path
) -> None:
    for directory in ("first", "second"):
        (tmp_path / directory).mkdir()
        program = tmp_path / directory / "program"
        program.write_text(f"#!/bin/sh\necho {directory} $0\n")
        program.chmod(0o644 if directory == "first" else 0o755)
    path = f"{tmp_path}/none:{tmp_path}/first:{tmp_path}/second"
    command = Command.from_request(("program",), (("PATH", path),))
    collected = await processes.execute(command)
    # As execvp does it, what may not be executed is passed over.
    assert collected.stdout.decode() == f"second {tmp_path}/second/program\n"


async def test_a_program_with_a_slash_is_relative_to_the_workdir(
    processes: Processes, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\npwd\n")
    program.chmod(0o755)
    command = Command.from_request(("./program",), workdir=str(tmp_path))
    assert (await processes.execute(command)).stdout.decode() == f"{tmp_path}\n"


async def test_the_workdir_is_the_root_unless_given(processes: Processes) -> None:
    assert (await sh(processes, "pwd")).stdout == b"/\n"
    assert (await sh(processes, "pwd", workdir="/usr")).stdout == b"/usr\n"
    assert (await sh(processes, "pwd", workdir="usr/lib")).stdout == b"/usr/lib\n"


async def test_a_program_that_cannot_start_is_an_error_with_the_cause(
    processes: Processes, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("#!/no/such/shell -e\n")
    assert "not found on the PATH /usr/local/sbin:" in await refusal(processes, "no-such-program")
    assert "not found" in await refusal(processes, "/no/such/program")
    assert "not found" in await refusal(processes, "")
    assert "not executable" in await refusal(processes, str(file))
    assert "is a directory" in await refusal(processes, str(tmp_path))
    file.chmod(0o755)
    assert "bad interpreter: '/no/such/shell'" in await refusal(processes, str(file))
    file.write_text("echo no first line\n")
    assert "exec format error" in await refusal(processes, str(file))
    nowhere = str(tmp_path / "nowhere")
    assert f"the workdir {nowhere} does not exist" in await refusal(
        processes, "true", workdir=nowhere
    )
    assert "is not a directory" in await refusal(processes, "true", workdir=str(file))
    assert "Argument list too long" in await refusal(processes, "true", "x" * MIB)


async def test_a_program_without_its_dynamic_linker_is_told_from_a_missing_one(
    processes: Processes, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/true", program)
    program.write_bytes(program.read_bytes().replace(b"/ld-linux", b"/ld-amiga"))
    message = await refusal(processes, str(program))
    assert "bad interpreter" in message
    assert "/ld-amiga" in message


async def test_output_of_more_than_a_pipe_holds_is_complete(processes: Processes) -> None:
    collected = await sh(processes, "seq 1 300000; seq 1 200000 >&2")
    assert collected.stdout.decode().split() == [str(number) for number in range(1, 300001)]
    assert collected.stderr.decode().split() == [str(number) for number in range(1, 200001)]


async def test_output_is_binary(processes: Processes, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "data").write_bytes(data)
    assert (await sh(processes, f"cat {tmp_path}/data")).stdout == data


async def test_output_up_to_the_limit_is_complete(processes: Processes) -> None:
    collected = await sh(processes, f"head -c {OUTPUT_LIMIT_BYTES} /dev/zero")
    assert len(collected.stdout) == OUTPUT_LIMIT_BYTES
    assert not collected.stdout_truncated
    assert collected.stderr == b""


async def test_beyond_the_limit_the_head_is_kept_and_the_command_undisturbed(
    processes: Processes, tmp_path: Path
) -> None:
    collected = await sh(
        processes,
        "echo head; head -c 20000000 /dev/zero; printf 'no newline' >&2; exit 3",
    )
    assert collected.exit_code == 3
    assert len(collected.stdout) == OUTPUT_LIMIT_BYTES
    assert collected.stdout.startswith(b"head\n\0")
    assert collected.stdout_truncated
    assert not collected.stderr_truncated
    assert collected.stderr.decode() == (
        f"no newline\ninnkeep: stdout truncated to {OUTPUT_LIMIT_BYTES} of 20000005 bytes\n"
    )


async def test_both_streams_are_truncated_on_their_own(processes: Processes) -> None:
    collected = await sh(processes, "(yes | head -c 12000000) >&2; head -c 13000000 /dev/zero")
    assert collected.stdout_truncated
    assert collected.stderr_truncated
    *_, about_stdout, about_stderr = collected.stderr.decode().splitlines()
    assert about_stdout.endswith(f"stdout truncated to {OUTPUT_LIMIT_BYTES} of 13000000 bytes")
    assert about_stderr.endswith(f"stderr truncated to {OUTPUT_LIMIT_BYTES} of 12000000 bytes")


async def test_a_writer_whose_reader_has_gone_ends(processes: Processes) -> None:
    assert (await sh(processes, "yes | head -n 1")).stdout == b"y\n"


async def test_stdin_is_empty_unless_given(processes: Processes) -> None:
    assert (await sh(processes, "cat; readlink /proc/self/fd/0")).stdout == b"/dev/null\n"
    assert (await sh(processes, "cat", stdin_data="")).stdout == b""
    assert (await sh(processes, "cat", stdin_data="grüße\0")).stdout == "grüße\0".encode()


async def test_stdin_and_output_of_megabytes_pass_each_other(processes: Processes) -> None:
    data = "0123456789abcdef" * (5 * MIB // 16)
    assert (await sh(processes, "cat", stdin_data=data)).stdout == data.encode()


async def test_stdin_that_is_not_read_holds_nothing_up(processes: Processes) -> None:
    data = "x" * 5 * MIB
    assert (await sh(processes, "exec <&-; echo done", stdin_data=data)).stdout == b"done\n"
    assert (await sh(processes, "head -c 1", stdin_data=data)).stdout == b"x"
    assert (await sh(processes, "echo done", stdin_data=data)).stdout == b"done\n"


async def test_a_time_limit_ends_the_whole_tree_and_keeps_its_output(
    processes: Processes, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        script = line.script(
            "echo begun; setsid sh -c '(sleep 1000 &) ; sleep 1000' & nohup sleep 1000"
        )
        collected = await sh(processes, script, timeout_s=0.3)
        assert collected.exit_code == 124
        assert collected.outcome.timed_out
        assert collected.stdout == b"begun\n"
        await line.heard()
        assert not line.is_held()


async def test_a_time_limit_of_nothing_is_over_at_once(processes: Processes) -> None:
    collected = await sh(processes, "sleep 1000", timeout_s=0)
    assert collected.exit_code == 124


async def test_the_longest_time_limit_of_the_wire_is_one(processes: Processes) -> None:
    collected = await sh(processes, "exit 5", timeout_s=(2**64 - 1) / 1000)
    assert collected.exit_code == 5


async def test_a_command_that_ignores_term_ends_at_its_time_limit(processes: Processes) -> None:
    script = "trap '' TERM HUP INT; while :; do sleep 1000; done"
    assert (await sh(processes, script, timeout_s=0.1)).exit_code == 124


async def test_a_cancelled_command_leaves_nothing(
    processes: Processes, cgroup_root: Path, tmp_path: Path
) -> None:
    before = resources()
    with lifeline(tmp_path) as line:
        async with trio.open_nursery() as connection:
            script = line.script("setsid sh -c '(setsid sleep 1000 &); sleep 1000' & sleep 1000")
            connection.start_soon(sh, processes, script)
            await line.heard()
            connection.cancel_scope.cancel()
        assert not line.is_held()
    assert cgroups_of_commands(cgroup_root) == []
    assert resources() - before == set()


async def test_a_background_process_with_the_pipes_does_not_hold_up_the_answer(
    processes: Processes, cgroup_root: Path, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        started = trio.current_time()
        collected = await sh(processes, line.script("sleep 1000 & echo out; echo err >&2"))
        assert trio.current_time() - started < 1
        assert collected == Collected(Outcome(exit_code=0), b"out\n", b"err\n")
        await line.heard()
        assert line.is_held()
        assert len(cgroups_of_commands(cgroup_root)) == 1


async def test_what_comes_just_after_the_end_is_collected(
    processes: Processes, tmp_path: Path
) -> None:
    # As a pipeline's last program does it, the background process ends on its input's end.
    fifo = tmp_path / "fifo"
    script = f"mkfifo {fifo}; (read word <{fifo}; echo late) & exec 8>{fifo}; echo early"
    assert (await sh(processes, script)).stdout == b"early\nlate\n"


async def test_a_background_process_that_never_stops_writing_does_not_hold_up_the_answer(
    processes: Processes,
) -> None:
    started = trio.current_time()
    collected = await sh(processes, "yes & echo $!")
    assert trio.current_time() - started < 1
    assert collected.exit_code == 0


async def test_two_hundred_commands_leave_no_trace(processes: Processes, cgroup_root: Path) -> None:
    await sh(processes, "true")
    before = resources()
    limiter = trio.CapacityLimiter(8)

    async def run_one(number: int) -> None:
        async with limiter:
            assert (await sh(processes, f"exit {number % 256}")).exit_code == number % 256

    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(run_one, number)
    assert resources() - before == set()
    assert cgroups_of_commands(cgroup_root) == []


async def test_a_failed_start_leaves_no_trace(processes: Processes, cgroup_root: Path) -> None:
    await refusal(processes, "no-such-program")
    before = resources()
    for _ in range(20):
        await refusal(processes, "true", "x" * MIB)
    assert resources() - before == set()
    assert cgroups_of_commands(cgroup_root) == []


async def test_without_cgroups_commands_run_and_their_process_group_dies(tmp_path: Path) -> None:
    with lifeline(tmp_path) as line:
        async with open_processes(None, tmp_path / "logs") as processes:
            assert (await sh(processes, "echo $0")).stdout == b"sh\n"
            script = line.script("sleep 1000 & sleep 1000")
            assert (await sh(processes, script, timeout_s=0.2)).exit_code == 124
        await line.heard()
        assert not line.is_held()


def resources() -> set[str]:
    """This process's descriptors, with what they are of, and its children, zombies included.

    Other tests may have left some that go meanwhile: what counts is what has come.
    """
    found = {f"child {pid}" for pid in children(os.getpid())}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the directory itself
            found.add(f"{link.name}: {link.readlink()}")
    return found


def cgroups_of_commands(root: Path) -> list[Path]:
    return [path for path in (root / "workloads" / "commands").iterdir() if path.is_dir()]
