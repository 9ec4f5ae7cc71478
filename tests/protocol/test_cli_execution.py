"""``innkeep run`` and ``innkeep exec``: command lines that end in another command's."""

from pathlib import Path

import pytest

from protocol import AgentResponse, requests, responses
from tests.protocol.command_line import ABSENT, ALPINE, DONE, PULLED, with_answers
from tests.protocol.fake_agent import Answers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


async def test_a_commands_bytes_and_exit_code_come_through(path: Path) -> None:
    completed = responses.Completed(42, b"\x00\xff\r\n\x1b[0m", b"\xfe no newline")
    result, asked = await with_answers(path, {requests.VmExec: [[completed]]}, "exec", "x")
    assert asked == [requests.VmExec(("x",))]
    assert result.returncode == 42
    assert result.stdout == completed.stdout
    assert result.stderr == completed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["-e", "A=1", "-w", "/w", "ls", "-e", "B=2", "--", "--help"],
        ["-e", "A=1", "-w", "/w", "--", "ls", "-e", "B=2", "--", "--help"],
    ],
)
async def test_options_end_where_the_command_starts(path: Path, arguments: list[str]) -> None:
    _, asked = await with_answers(path, {requests.VmExec: [[DONE]]}, "exec", *arguments)
    command = ("ls", "-e", "B=2", "--", "--help")
    assert asked == [requests.VmExec(command, env=(("A", "1"),), workdir="/w")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-e", "A=1", "-w", "/w", "-u", "1:2", "alpine", "ls", "-e", "--"],
        ["alpine", "-e", "A=1", "-w", "/w", "-u", "1:2", "ls", "-e", "--"],
        ["-e", "A=1", "alpine", "-w/w", "--user=1:2", "--", "ls", "-e", "--"],
        ["-e", "A=1", "-w", "/w", "-u", "1:2", "--", "alpine", "ls", "-e", "--"],
        ["-e", "A=1", "-w", "/w", "-u", "1:2", "--", "alpine", "--", "ls", "-e", "--"],
    ],
)
async def test_options_of_run_stand_on_either_side_of_the_image(
    path: Path, arguments: list[str]
) -> None:
    _, asked = await with_answers(path, {requests.Run: [[DONE]]}, "run", *arguments)
    request = requests.Run(
        "alpine", ("ls", "-e", "--"), env=(("A", "1"),), workdir="/w", user="1:2"
    )
    assert asked == [request]


async def test_run_without_a_command_leaves_it_to_the_image(path: Path) -> None:
    result, asked = await with_answers(path, {requests.Run: [[DONE]]}, "run", "alpine")
    assert asked == [requests.Run("alpine", ())]
    assert (result.returncode, result.stdout, result.stderr) == (0, b"out\n", b"")


async def test_a_variable_without_a_value_is_taken_from_here(path: Path) -> None:
    arguments = ["exec", "-e", "HERE", "-e", "NOWHERE", "-e", "EMPTY=", "-e", "A=b=c", "env"]
    answers = {requests.VmExec: [[DONE]]}
    _, asked = await with_answers(path, answers, *arguments, HERE="yes")
    env = (("HERE", "yes"), ("EMPTY", ""), ("A", "b=c"))
    assert asked == [requests.VmExec(("env",), env=env)]


@pytest.mark.parametrize(("seconds", "timeout_ms"), [("1.5", 1500), ("0", 0), ("1e30", 2**64 - 1)])
async def test_time_limits_are_in_seconds(path: Path, seconds: str, timeout_ms: int) -> None:
    arguments = ["exec", "--timeout", seconds, "sleep", "9"]
    _, asked = await with_answers(path, {requests.VmExec: [[DONE]]}, *arguments)
    assert asked == [requests.VmExec(("sleep", "9"), timeout_ms=timeout_ms)]


async def test_run_pulls_an_image_that_is_not_there(path: Path) -> None:
    answers = {requests.Run: [[ABSENT], [DONE]], requests.Pull: [PULLED]}
    result, asked = await with_answers(path, answers, "run", "alpine", "true")
    run = requests.Run("alpine", ("true",))
    assert asked == [run, requests.Pull("alpine"), run]
    assert (result.returncode, result.stdout, result.stderr) == (0, b"out\n", b"")


async def test_run_pulls_always_or_never_when_told(path: Path, tmp_path: Path) -> None:
    run = requests.Run("alpine", ())
    answers = {requests.Run: [[DONE]], requests.Pull: [PULLED]}
    _, asked = await with_answers(path, answers, "run", "--pull", "always", "alpine")
    assert asked == [requests.Pull("alpine"), run]

    never = tmp_path / "never.sock"
    answers = {requests.Run: [[ABSENT]]}
    result, asked = await with_answers(never, answers, "run", "--pull=never", "alpine")
    assert asked == [run]
    assert (result.returncode, result.stderr) == (125, b"innkeep: image not found: alpine\n")


@pytest.mark.parametrize(
    ("stored", "is_pulled"),
    [(responses.Ok(ALPINE), False), (ABSENT, True)],
    ids=["stored", "absent"],
)
async def test_run_for_a_platform_pulls_where_another_is_stored(
    path: Path, stored: AgentResponse, is_pulled: bool
) -> None:
    answers = {
        requests.Query: [[stored]],
        requests.Run: [[DONE]],
        requests.Pull: [PULLED],
    }
    _, asked = await with_answers(path, answers, "run", "--platform", "linux/amd64", "alpine")
    pull = [requests.Pull("alpine", oci_platform="linux/amd64")] if is_pulled else []
    assert asked == [requests.Query("alpine"), *pull, requests.Run("alpine", ())]


async def test_run_for_another_platform_than_the_stored_one_pulls(path: Path) -> None:
    answers: Answers = {
        requests.Query: [[responses.Ok(ALPINE)]],
        requests.Run: [[DONE]],
        requests.Pull: [PULLED],
    }
    _, asked = await with_answers(path, answers, "run", "--platform", "linux/arm64", "alpine")
    assert requests.Pull("alpine", oci_platform="linux/arm64") in asked


async def test_a_pull_that_fails_ends_the_run(path: Path) -> None:
    failed = responses.Error("pull alpine: 404", "PULL_FAILED")
    answers: Answers = {requests.Run: [[ABSENT]], requests.Pull: [[failed]]}
    result, _ = await with_answers(path, answers, "run", "alpine")
    assert (result.returncode, result.stderr) == (125, b"innkeep: pull alpine: 404\n")
