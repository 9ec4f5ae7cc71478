"""``innkeep workload`` against the real ports."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.protocol.command_line import PROJECT, innkeep
from tests.support.workload import TOKEN, Served, open_log, open_peer, outlived


async def workload(ports: Served, *arguments: str, token: str = TOKEN) -> Any:
    """Run the command line to its end."""
    file = ports.run_dir.parent / "given"
    file.write_text(f"{token}\n")
    return await innkeep(
        "--connect", ports.address, "workload", *arguments, env={"INNKEEP_TOKEN_FILE": str(file)}
    )


async def test_exec_passes_on_output_and_exit_code(ports: Served) -> None:
    result = await workload(ports, "exec", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


async def test_exec_of_what_is_not_there_says_why(ports: Served) -> None:
    result = await workload(ports, "exec", "no-such-program")
    assert result.returncode == 127
    assert result.stderr.startswith(b"innkeep: failed to start: ")


async def test_exec_may_have_a_terminal(ports: Served) -> None:
    assert (await workload(ports, "exec", "-t", "stty", "size")).stdout == b"24 80\r\n"


async def test_run_stays_with_the_workload_and_options_end_where_it_begins(ports: Served) -> None:
    result = await workload(ports, "run", "-e", "A=b", "-w", "/tmp", "sh", "-c", 'echo "$A $PWD"')
    assert (result.returncode, result.stdout, result.stderr) == (0, b"b /tmp\n", b"")


async def test_run_detached_leaves_it_running_for_signal_stop_and_logs(ports: Served) -> None:
    script = "trap 'echo got it' USR1; echo on; while :; do sleep 0.01; done"
    result = await workload(ports, "run", "-d", "sh", "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    again = await workload(ports, "run", "true")
    assert again.returncode == 125
    assert b"one at a time" in again.stderr
    async with open_log(ports.address) as log:
        await log.output(0, b"on\n")
        assert (await workload(ports, "signal", "USR1")).returncode == 0
        await log.output(0, b"got it\n")
    assert (await workload(ports, "logs")).stdout == b"on\ngot it\n"
    tree = ports.services.processes.tree
    assert tree is not None
    async with outlived(tree.workloads):
        assert (await workload(ports, "stop", "--timeout", "0.1")).returncode == 0
    gone = await workload(ports, "signal", "9")
    assert gone.returncode == 125
    assert b"no workload runs" in gone.stderr


async def test_logs_follow_what_is_written(ports: Served, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    file = tmp_path / "given"
    file.write_text(TOKEN)
    argv = ["--connect", ports.address, "workload", "--token-file", str(file), "logs", "-f"]

    async def follow(*, task_status: trio.TaskStatus[trio.Process]) -> None:
        command = [sys.executable, "-m", "protocol.cli", *argv]
        await trio.run_process(
            command, stdout=subprocess.PIPE, check=False, cwd=PROJECT, task_status=task_status
        )

    async with open_peer(ports.address) as peer, trio.open_nursery() as nursery:
        await peer.run(1, "sh", "-c", f"echo first; cat {fifo}; sleep 1000")
        await peer.output(1, b"first")
        process: trio.Process = await nursery.start(follow)
        assert process.stdout is not None
        assert await process.stdout.receive_some(6) == b"first\n"
        await trio.to_thread.run_sync(fifo.write_text, "second\n")
        assert await process.stdout.receive_some(7) == b"second\n"
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130


@pytest.mark.parametrize("command", [["exec", "true"], ["logs"], ["stop"]])
async def test_a_wrong_token_is_one_line_that_does_not_show_it(
    ports: Served, command: list[str]
) -> None:
    result = await workload(ports, *command, token="hunter2" * 8)
    assert result.returncode == 125
    assert b"did not accept the token" in result.stderr
    assert b"hunter2" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["exec", "true"], b"no token given"),
        (["--token-file", "/no/where", "exec", "true"], b"cannot read /no/where"),
        (["--token-file", "/dev/null", "exec", "true"], b"/dev/null holds no token"),
        (["--token-file", "/dev/null", "signal", "WAT"], b"no such signal: WAT"),
        (["exec"], b"COMMAND"),
        (["wat"], b"wat"),
    ],
)
async def test_a_wrong_command_line_is_one_line(arguments: list[str], complaint: bytes) -> None:
    result = await innkeep("--connect", "unix:/no/where", "workload", *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert result.stderr.count(b"\n") == 1
