"""``innkeep``'s commands about what is stored: garbage, and layers on their way out."""

import json
from pathlib import Path

import pytest

from protocol import requests, responses
from protocol.values import CollectedGarbage
from tests.protocol.command_line import ALPINE, with_answers

GARBAGE = CollectedGarbage(
    dry_run=False,
    freed_bytes=7_300_000,
    images=(ALPINE.reference,),
    layers=("sha256:" + "12" * 32,),
    blobs=("sha256:" + "34" * 32,),
    partial_blobs=("sha256:" + "56" * 32,),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@pytest.mark.parametrize(
    ("options", "dry_run", "purge_all"),
    [
        ([], False, False),
        (["--dry-run"], True, False),
        (["--purge"], False, True),
        (["--purge", "--dry-run"], True, True),
    ],
)
async def test_gc_asks_for_what_its_options_say(
    path: Path, options: list[str], dry_run: bool, purge_all: bool
) -> None:
    answer = responses.Ok({"dry_run": dry_run, "freed_bytes": 0})
    result, asked = await with_answers(path, {requests.GarbageCollect: [[answer]]}, "gc", *options)
    assert asked == [requests.GarbageCollect(dry_run=dry_run, purge_all=purge_all)]
    assert result.stdout == (b"0 bytes would be freed\n" if dry_run else b"0 bytes freed\n")
    assert result.returncode == 0


async def test_gc_prints_what_went_and_how_much_that_was(path: Path) -> None:
    answers = {requests.GarbageCollect: [[responses.Ok(GARBAGE)]]}
    result, _ = await with_answers(path, answers, "gc", "--purge")
    assert result.stdout.decode().splitlines() == [
        f"image: {ALPINE.reference}",
        f"layer: {GARBAGE.layers[0]}",
        f"blob: {GARBAGE.blobs[0]}",
        f"partial blob: {GARBAGE.partial_blobs[0]}",
        "7.3 MB freed",
    ]


async def test_gc_gives_the_agents_own_answer_as_json(path: Path) -> None:
    answers = {requests.GarbageCollect: [[responses.Ok({"dry_run": True, "freed_bytes": 5})]]}
    result, _ = await with_answers(path, answers, "--json", "gc", "--dry-run")
    assert json.loads(result.stdout) == {"dry_run": True, "freed_bytes": 5}
