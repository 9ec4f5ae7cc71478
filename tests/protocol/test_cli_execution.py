"""``innkeep run`` and ``innkeep exec``: command lines that end in another command's."""

import json
from pathlib import Path
from typing import Any

import pytest

from protocol import AgentResponse, requests, responses
from protocol.values import Mount
from tests.protocol.command_line import ABSENT, ALPINE, PULLED, with_answers
from tests.protocol.command_line import DONE as COMPLETED
from tests.protocol.fake_agent import Answers
from tests.protocol.sessions import DONE, with_session


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


async def test_a_commands_bytes_and_exit_code_come_through(path: Path) -> None:
    out, err = b"\x00\xff\r\n\x1b[0m", b"\xfe no newline"
    answers: list[AgentResponse] = [
        responses.Started(),
        responses.Stdout(out),
        responses.Stderr(err),
        responses.Exited(42),
    ]
    result, asked = await with_session(path, {requests.VmExec: [answers]}, "exec", "x")
    assert asked == [requests.VmExec(("x",), interactive=True)]
    assert (result.returncode, result.stdout, result.stderr) == (42, out, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-e", "A=1", "-w", "/w", "ls", "-e", "B=2", "--", "--help"],
        ["-e", "A=1", "-w", "/w", "--", "ls", "-e", "B=2", "--", "--help"],
    ],
)
async def test_options_end_where_the_command_starts(path: Path, arguments: list[str]) -> None:
    _, asked = await with_session(path, {requests.VmExec: [DONE]}, "exec", *arguments)
    command = ("ls", "-e", "B=2", "--", "--help")
    assert asked == [requests.VmExec(command, env=(("A", "1"),), workdir="/w", interactive=True)]


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
    _, asked = await with_session(path, {requests.Run: [DONE]}, "run", *arguments)
    request = requests.Run(
        "alpine",
        ("ls", "-e", "--"),
        env=(("A", "1"),),
        workdir="/w",
        user="1:2",
        interactive=True,
    )
    assert asked == [request]


async def test_run_without_a_command_leaves_it_to_the_image(path: Path) -> None:
    result, asked = await with_session(path, {requests.Run: [DONE]}, "run", "alpine")
    assert asked == [requests.Run("alpine", (), interactive=True)]
    assert (result.returncode, result.stdout, result.stderr) == (0, b"out\n", b"")


async def test_a_variable_without_a_value_is_taken_from_here(path: Path) -> None:
    arguments = ["exec", "-e", "HERE", "-e", "NOWHERE", "-e", "EMPTY=", "-e", "A=b=c", "env"]
    answers = {requests.VmExec: [DONE]}
    _, asked = await with_session(path, answers, *arguments, HERE="yes")
    env = (("HERE", "yes"), ("EMPTY", ""), ("A", "b=c"))
    assert asked == [requests.VmExec(("env",), env=env, interactive=True)]


@pytest.mark.parametrize(("seconds", "timeout_ms"), [("1.5", 1500), ("0", 0), ("1e30", 2**64 - 1)])
async def test_time_limits_are_in_seconds(path: Path, seconds: str, timeout_ms: int) -> None:
    arguments = ["exec", "--timeout", seconds, "sleep", "9"]
    _, asked = await with_session(path, {requests.VmExec: [DONE]}, *arguments)
    assert asked == [requests.VmExec(("sleep", "9"), timeout_ms=timeout_ms, interactive=True)]


async def test_run_pulls_an_image_that_is_not_there(path: Path) -> None:
    answers = {requests.Run: [[ABSENT], DONE], requests.Pull: [PULLED]}
    result, asked = await with_session(path, answers, "run", "alpine", "true")
    run = requests.Run("alpine", ("true",), interactive=True)
    assert asked == [run, requests.Pull("alpine"), run]
    assert (result.returncode, result.stdout, result.stderr) == (0, b"out\n", b"")


async def test_run_pulls_always_or_never_when_told(path: Path, tmp_path: Path) -> None:
    run = requests.Run("alpine", (), interactive=True)
    answers = {requests.Run: [DONE], requests.Pull: [PULLED]}
    _, asked = await with_session(path, answers, "run", "--pull", "always", "alpine")
    assert asked == [requests.Pull("alpine"), run]

    never = tmp_path / "never.sock"
    answers = {requests.Run: [[ABSENT]]}
    result, asked = await with_session(never, answers, "run", "--pull=never", "alpine")
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
        requests.Run: [DONE],
        requests.Pull: [PULLED],
    }
    _, asked = await with_session(path, answers, "run", "--platform", "linux/amd64", "alpine")
    pull = [requests.Pull("alpine", oci_platform="linux/amd64")] if is_pulled else []
    assert asked == [requests.Query("alpine"), *pull, requests.Run("alpine", (), interactive=True)]


async def test_run_for_another_platform_than_the_stored_one_pulls(path: Path) -> None:
    answers: Answers = {
        requests.Query: [[responses.Ok(ALPINE)]],
        requests.Run: [DONE],
        requests.Pull: [PULLED],
    }
    _, asked = await with_session(path, answers, "run", "--platform", "linux/arm64", "alpine")
    assert requests.Pull("alpine", oci_platform="linux/arm64") in asked


async def test_a_pull_that_fails_ends_the_run(path: Path) -> None:
    failed = responses.Error("pull alpine: 404", "PULL_FAILED")
    answers: Answers = {requests.Run: [[ABSENT]], requests.Pull: [[failed]]}
    result, _ = await with_session(path, answers, "run", "alpine")
    assert (result.returncode, result.stderr) == (125, b"innkeep: pull alpine: 404\n")


async def test_an_error_after_the_start_ends_the_run_and_pulls_nothing(path: Path) -> None:
    lost = [responses.Started(), responses.Error("it is not found any more", "NOT_FOUND")]
    result, asked = await with_session(path, {requests.Run: [lost]}, "run", "alpine")
    assert asked == [requests.Run("alpine", (), interactive=True)]
    assert (result.returncode, result.stderr) == (125, b"innkeep: it is not found any more\n")


async def test_an_agent_that_answers_something_else_is_one_line(path: Path) -> None:
    result, _ = await with_session(path, {requests.VmExec: [[COMPLETED]]}, "exec", "x")
    assert result.returncode == 125
    assert result.stderr == b"innkeep: expected the answer started, got completed\n"


@pytest.mark.parametrize("arguments", [["exec", "x"], ["run", "alpine", "x"]])
async def test_json_asks_for_everything_at_once(path: Path, arguments: list[str]) -> None:
    kinds: Answers = {requests.VmExec: [[COMPLETED]], requests.Run: [[COMPLETED]]}
    result, asked = await with_answers(path, kinds, "--json", *arguments)
    request = requests.Run("alpine", ("x",)) if "run" in arguments else requests.VmExec(("x",))
    assert asked == [request]
    assert json.loads(result.stdout)["exit_code"] == 0


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (
            ["run", "-d", "--overlay", "box", "alpine", "top"],
            requests.Run("alpine", ("top",), detached=True, persistent_overlay_id="box"),
        ),
        (
            ["run", "alpine", "--detach", "--overlay=box"],
            requests.Run("alpine", (), detached=True, persistent_overlay_id="box"),
        ),
        (
            ["run", "--background", "--overlay", "box", "alpine", "top"],
            requests.Run("alpine", ("top",), background=True, persistent_overlay_id="box"),
        ),
        (["exec", "--background", "top"], requests.VmExec(("top",), background=True)),
    ],
)
async def test_what_is_left_running_is_named_in_one_line(
    path: Path, arguments: list[str], request_: Any
) -> None:
    named = [[responses.Completed(0, b"4711", b"")]]
    answers: Answers = {requests.Run: named, requests.VmExec: named}
    result, asked = await with_answers(path, answers, *arguments)
    assert asked == [request_]
    assert (result.returncode, result.stdout, result.stderr) == (0, b"4711\n", b"")


async def test_a_detached_run_pulls_an_image_that_is_not_there(path: Path) -> None:
    answers: Answers = {
        requests.Run: [[ABSENT], [responses.Completed(0, b"id", b"")]],
        requests.Pull: [PULLED],
    }
    result, asked = await with_answers(path, answers, "run", "-d", "--overlay", "box", "alpine")
    assert [type(request) for request in asked] == [requests.Run, requests.Pull, requests.Run]
    assert result.stdout == b"id\n"


async def test_what_the_agent_will_not_leave_running_is_one_line(path: Path) -> None:
    refused = responses.Error("background needs an overlay", "INVALID_REQUEST")
    answers: Answers = {requests.Run: [[refused]]}
    result, _ = await with_answers(path, answers, "run", "--background", "alpine")
    assert (result.returncode, result.stdout) == (125, b"")
    assert result.stderr == b"innkeep: background needs an overlay\n"


async def test_volumes_privileges_and_an_overlay_are_passed_on(path: Path) -> None:
    volumes = ["-v", "share:/data", "--volume", "/srv/www:/www:ro", "-vmore:/"]
    arguments = ["run", *volumes, "--privileged", "--overlay", "box", "alpine", "-v", "last:/l"]
    _, asked = await with_session(path, {requests.Run: [DONE]}, *arguments)
    mounts = (
        Mount("share", "/data", read_only=False),
        Mount("/srv/www", "/www", read_only=True),
        Mount("more", "/", read_only=False),
        Mount("last", "/l", read_only=False),
    )
    assert asked == [
        requests.Run(
            "alpine",
            (),
            mounts=mounts,
            interactive=True,
            persistent_overlay_id="box",
            unprivileged=False,
        )
    ]
