"""``innkeep`` as a program, against the other end of the protocol on a real socket."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from protocol import AgentResponse, requests, responses
from protocol.values import StorageStatus
from tests.protocol.command_line import ALPINE, PROJECT, PULLED, innkeep, with_answers
from tests.protocol.fake_agent import Peer, Script, serving
from tests.protocol.sessions import DONE

WRONG_VOLUMES = (
    "",
    "share",
    ":",
    ":/data",
    "share:",
    "share:data",
    "share::ro",
    "share:/data:",
    "share:/data:rx",
    "share:/data:ro:ro",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


async def test_ping_says_that_the_agent_is_there(path: Path) -> None:
    answers = {requests.Ping: [[responses.Pong(1, ("resume",))]]}
    result, asked = await with_answers(path, answers, "ping")
    assert asked == [requests.Ping()]
    assert result.stdout.startswith(b"pong: protocol version 1, ")
    assert result.stdout.endswith(b" ms, resume\n")
    assert (result.returncode, result.stderr) == (0, b"")


async def test_ping_tells_what_is_wrong_with_the_agents_configuration(path: Path) -> None:
    answers = {requests.Ping: [[responses.Pong(1, config_errors=("innkeep.a: what?",))]]}
    result, _ = await with_answers(path, answers, "ping")
    assert result.returncode == 0
    assert b"configuration: innkeep.a: what?" in result.stderr


async def test_the_address_may_come_from_the_environment(path: Path) -> None:
    script = Script({requests.Ping: [[responses.Pong(1)]]})
    async with serving(path, script) as address:
        result = await innkeep("--json", "ping", env={"INNKEEP_CONNECT": address})
    assert json.loads(result.stdout) == {"status": "pong", "version": 1}
    assert result.returncode == 0


async def test_without_an_address_it_says_what_to_do() -> None:
    result = await innkeep("ping")
    assert result.returncode == 2
    assert result.stderr == (
        b"innkeep: no agent given: use --connect ADDRESS or set INNKEEP_CONNECT "
        b"(unix:PATH, vsock:CID:PORT or mux:PATH:PORT)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [(["ping"], 1), (["exec", "true"], 125), (["run", "alpine"], 125)],
)
async def test_an_agent_that_is_not_there_is_one_line(
    path: Path, arguments: list[str], exit_code: int
) -> None:
    result = await innkeep("--connect", f"unix:{path}", *arguments)
    assert result.returncode == exit_code
    assert result.stdout == b""
    expected = f"innkeep: cannot connect to unix:{path}: No such file or directory\n"
    assert result.stderr.decode() == expected


@pytest.mark.parametrize(
    ("arguments", "exit_code"), [(["status"], 1), (["exec", "true"], 125), (["run", "alpine"], 125)]
)
async def test_what_the_agent_refuses_is_one_line(
    path: Path, arguments: list[str], exit_code: int
) -> None:
    error = [[responses.Error("it is broken:\n\tvery \x1b[31mmuch", "INTERNAL_ERROR")]]
    kinds = (requests.StorageStatus, requests.VmExec, requests.Run)
    result, _ = await with_answers(path, dict.fromkeys(kinds, error), *arguments)
    assert result.returncode == exit_code
    assert result.stderr == b"innkeep: it is broken:  very  [31mmuch\n"


@pytest.mark.parametrize("arguments", [["exec", "true"], ["status"]])
async def test_an_agent_that_hangs_up_is_one_line(path: Path, arguments: list[str]) -> None:
    async def conversation(peer: Peer) -> None:
        await peer.receive()

    async with serving(path, conversation) as address:
        result = await innkeep("--connect", address, *arguments)
    assert result.returncode == (125 if "exec" in arguments else 1)
    expected = f"innkeep: {address}: the agent hung up before its answer\n"
    assert result.stderr.decode() == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], b"Missing command"),
        (["frobnicate"], b"frobnicate"),
        (["exec"], b"COMMAND"),
        (["run"], b"IMAGE"),
        (["exec", "--frobnicate", "ls"], b"--frobnicate"),
        (["run", "alpine", "--frobnicate", "ls"], b"--frobnicate"),
        (["run", "--pull", "sometimes", "alpine"], b"sometimes"),
        (["exec", "--timeout", "-1", "ls"], b"--timeout"),
        (["exec", "-e", "=x", "ls"], b"=x"),
        *((["run", "-v", v, "alpine"], b"TAG|DIR:PATH[:ro]") for v in WRONG_VOLUMES),
        (["exec", "-d", "ls"], b"-d"),
        (["run", "-d", "--background", "alpine"], b"--detach and --background exclude"),
        (["run", "-dit", "alpine"], b"--detach takes neither --interactive nor --tty"),
        (["exec", "-i", "--background", "ls"], b"--background takes neither"),
        (["--json", "exec", "-i", "ls"], b"--json takes neither"),
        (["--json", "run", "-t", "alpine"], b"--json takes neither"),
        (["--connect", "localhost:1", "exec", "ls"], b"localhost:1"),
    ],
)
async def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], complaint: bytes
) -> None:
    result = await innkeep(*arguments)
    assert result.returncode == 2
    assert result.stdout == b""
    assert result.stderr.startswith(b"innkeep: ")
    assert result.stderr.count(b"\n") == 1
    assert complaint in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["ping", "pull", "images", "query", "run", "exec", "status", "shutdown", "--json"]),
        (
            ["run"],
            [
                *("--env", "--workdir", "--user", "--timeout", "--platform", "--pull"),
                *("--interactive", "--tty", "--detach", "--background", "--overlay"),
                *("--volume", "--privileged"),
            ],
        ),
        (
            ["exec"],
            ["--env", "--workdir", "--timeout", "--interactive", "--tty", "--background"],
        ),
    ],
)
async def test_help_tells_what_there_is(arguments: list[str], words: list[str]) -> None:
    result = await innkeep(*arguments, "--help")
    assert result.returncode == 0
    assert all(word in result.stdout.decode() for word in words)


async def test_pull_prints_what_it_got_and_no_bar_into_a_pipe(path: Path) -> None:
    arguments = ["pull", "alpine", "--platform", "linux/arm64"]
    result, asked = await with_answers(path, {requests.Pull: [PULLED]}, *arguments)
    assert asked == [requests.Pull("alpine", oci_platform="linux/arm64")]
    assert result.stdout.decode() == f"{ALPINE.reference} {ALPINE.digest}\n"
    assert result.stderr == b""


async def test_pull_draws_a_bar_on_a_terminal(path: Path) -> None:
    ours, theirs = os.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    try:
        async with serving(path, Script({requests.Pull: [PULLED]})) as address:
            command = [sys.executable, "-m", "protocol.cli", "--connect", address, "pull", "a"]
            result = await trio.run_process(
                command, capture_stdout=True, stderr=theirs, env=environ, cwd=PROJECT
            )
        drawn = os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"Pulling layer 1/1" in drawn
    assert b"50%" in drawn
    assert result.stdout.decode() == f"{ALPINE.reference} {ALPINE.digest}\n"


async def test_images_are_a_table_that_a_pipe_does_not_cut(path: Path) -> None:
    answers = {requests.ListImages: [[responses.Ok([ALPINE])]]}
    result, _ = await with_answers(path, answers, "images")
    heading, row = result.stdout.decode().splitlines()
    assert heading.split() == ["IMAGE", "DIGEST", "PLATFORM", "LAYERS", "SIZE"]
    assert row.split() == [ALPINE.reference, "abababababab", "linux/amd64", "1", "7.8", "MB"]


async def test_query_describes_an_image(path: Path) -> None:
    result, asked = await with_answers(
        path, {requests.Query: [[responses.Ok(ALPINE)]]}, "query", "alpine"
    )
    assert asked == [requests.Query("alpine")]
    lines = dict(line.split(":", 1) for line in result.stdout.decode().splitlines())
    assert lines["reference"].strip() == ALPINE.reference
    assert lines["command"].strip() == "/bin/sh"
    assert "user" not in lines


async def test_status_shows_the_storage(path: Path) -> None:
    storage = StorageStatus(True, 10_000_000, 2_000_000, 3, 1)
    answers = {requests.StorageStatus: [[responses.Ok(storage)]]}
    result, _ = await with_answers(path, answers, "status")
    assert result.stdout.split(b"\n")[:2] == [b"ready:  yes", b"used:   2.0 MB of 10.0 MB"]


@pytest.mark.parametrize(
    ("arguments", "answer", "printed"),
    [
        (["images"], responses.Ok([]), []),
        (["shutdown"], responses.Ok({"shutdown": True}), {"shutdown": True}),
        (["status"], responses.Ok({"ready": False}), {"ready": False}),
        (["query", "a"], responses.Ok({"reference": "é"}), {"reference": "é"}),
        (["pull", "a"], responses.Ok({"reference": "a"}), {"reference": "a"}),
        (
            ["exec", "x"],
            responses.Completed(3, b"o", b"\xff"),
            {"status": "completed", "exit_code": 3, "stdout": "bw==", "stderr": "/w=="},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
async def test_json_is_what_the_agent_answered(
    path: Path, arguments: list[str], answer: AgentResponse, printed: object
) -> None:
    async def conversation(peer: Peer) -> None:
        await peer.receive()
        await peer.send(answer)

    async with serving(path, conversation) as address:
        result = await innkeep("--json", "--connect", address, *arguments)
    assert json.loads(result.stdout) == printed
    assert result.returncode == (3 if "exec" in arguments else 0)
    assert result.stderr == b""


async def test_shutdown_says_nothing(path: Path) -> None:
    answers = {requests.Shutdown: [[responses.Ok({"shutdown": True})]]}
    result, asked = await with_answers(path, answers, "shutdown")
    assert asked == [requests.Shutdown()]
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


async def test_an_interrupt_hangs_up_and_ends_quietly(path: Path) -> None:
    asked, hung_up = trio.Event(), trio.Event()

    async def conversation(peer: Peer) -> None:
        await peer.receive()
        asked.set()
        assert await peer.receive() is None
        hung_up.set()

    async with serving(path, conversation) as address:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "protocol.cli", "--connect", address, "exec", "sleep"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=PROJECT,
        )
        await asked.wait()
        process.send_signal(signal.SIGINT)
        await hung_up.wait()
        assert process.stdout is not None
        async with process.stdout:
            assert await process.stdout.receive_some() == b""
        assert await process.wait() == 130


@pytest.mark.parametrize("arguments", [["exec", "yes"], ["ping"]])
async def test_a_reader_that_goes_away_is_no_traceback(path: Path, arguments: list[str]) -> None:
    script = Script(
        {requests.VmExec: [DONE], requests.Stdin: [[]], requests.Ping: [[responses.Pong(1)]]}
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        async with serving(path, script) as address:
            result = await trio.run_process(
                [sys.executable, "-m", "protocol.cli", "--connect", address, *arguments],
                stdout=writing,
                capture_stderr=True,
                check=False,
                cwd=PROJECT,
            )
    finally:
        os.close(writing)
    assert result.returncode == 1
    assert result.stderr == b""


@pytest.mark.parametrize("library", ["typer", "rich"])
async def test_without_its_extra_it_says_what_to_install(library: str) -> None:
    script = f"import sys; sys.modules[{library!r}] = None; import protocol.cli as c; c.main()"
    result = await trio.run_process(
        [sys.executable, "-c", script],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=PROJECT,
    )
    assert result.returncode == 1
    expected = f"innkeep: {library} is not installed; run: pip install innkeep[cli]\n"
    assert result.stderr.decode() == expected
