"""`innkeep cp`: what goes where, and what is refused, without a machine."""

from pathlib import Path

import pytest

from protocol import requests, responses
from protocol.cli.connection import CommandFailed
from protocol.cli.places import LocalPath, Stream, VmPath, place, target
from tests.protocol.command_line import innkeep, with_answers


def test_places_are_told_from_each_other() -> None:
    assert place("vm:/etc/x") == VmPath("/etc/x")
    assert place("./vm:/etc/x") == LocalPath("./vm:/etc/x")
    assert place("a:b") == LocalPath("a:b")
    assert place("-") == Stream()
    assert place("./-") == LocalPath("./-")


@pytest.mark.parametrize(
    ("source", "kind", "destination", "there", "result"),
    [
        # docs.docker.com/reference/cli/docker/container/cp
        ("a/f", "file", "/d", None, "/d"),
        ("a/f", "file", "/d", "file", "/d"),
        ("a/f", "file", "/d", "directory", "/d/f"),
        ("a/f", "file", "/d/", "directory", "/d/f"),
        ("a/f", "file", "/", "directory", "/f"),
        ("a/f", "symlink", "/d", "directory", "/d/f"),
        ("a/f", "directory", "/d", None, "/d"),
        ("a/f/", "directory", "/d", None, "/d"),
        ("a/f/.", "directory", "/d", None, "/d"),
        ("a/f", "directory", "/d", "directory", "/d/f"),
        ("a/f/", "directory", "/d/", "directory", "/d/f"),
        ("a/f/.", "directory", "/d", "directory", "/d"),
        (".", "directory", "/d", "directory", "/d"),
        ("/", "directory", "/d", "directory", "/d"),
    ],
)
def test_things_go_where_docker_puts_them(
    source: str, kind: str, destination: str, there: str | None, result: str
) -> None:
    assert target(LocalPath(source), kind, "f", VmPath(destination), there) == result
    assert target(VmPath(source), kind, "f", LocalPath(destination), there) == result


@pytest.mark.parametrize(
    ("source", "kind", "destination", "there", "blamed"),
    [
        ("a/f", "file", "/d/", None, "vm:/d/"),
        ("a/f", "file", "/d/", "file", "vm:/d/"),
        ("a/f/", "file", "/d", None, "a/f/"),
        ("a/f/.", "symlink", "/d", None, "a/f/."),
        ("a/f", "directory", "/d", "file", "vm:/d"),
    ],
)
def test_what_is_no_directory_is_not_taken_for_one(
    source: str, kind: str, destination: str, there: str | None, blamed: str
) -> None:
    with pytest.raises(CommandFailed, match=f"^{blamed} is no directory"):
        target(LocalPath(source), kind, "f", VmPath(destination), there)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "b"), "exactly one of SOURCE and DESTINATION is in the VM"),
        (("vm:/a", "vm:/b"), "exactly one of SOURCE and DESTINATION is in the VM"),
        (("-", "-"), "exactly one of SOURCE and DESTINATION is in the VM"),
        (("vm:", "b"), "a path is expected"),
        (("", "vm:/b"), "an empty path"),
    ],
)
async def test_what_is_no_copy_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    # No agent is asked.
    result = await innkeep("--connect", "unix:/no/such/agent", "cp", *arguments)
    assert result.returncode == 2
    assert words in result.stderr.decode()


async def test_an_agent_that_cannot_copy_is_told_so(tmp_path: Path) -> None:
    answers = {requests.Ping: [[responses.Pong(1, ("file-tree-v1",))]]}
    result, _ = await with_answers(tmp_path / "a.sock", answers, "cp", "vm:/etc", str(tmp_path))
    assert result.returncode == 1
    assert b"too old for copying: it lacks file-mtime-v1, file-resume-v1" in result.stderr
