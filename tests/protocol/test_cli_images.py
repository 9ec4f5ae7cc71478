"""``innkeep``'s commands about what is stored: garbage, and layers on their way out."""

import json
import os
import sys
from pathlib import Path

import attrs
import pytest
import trio

from protocol import requests, responses
from protocol.values import CollectedGarbage, PlannedLayer, PullPlan
from tests.protocol.command_line import ALPINE, PROJECT, innkeep, with_answers
from tests.protocol.fake_agent import Script, serving

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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["gc", "export-layer", "flatten-layers"]),
        (["gc"], ["--purge", "--dry-run"]),
        (["export-layer"], ["IMAGE", "INDEX", "--output"]),
        (["flatten-layers"], ["LOWERDIR", "--output"]),
    ],
)
async def test_help_tells_of_them(arguments: list[str], words: list[str]) -> None:
    result = await innkeep(*arguments, "--help")
    assert all(word in result.stdout.decode() for word in words)


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


PLAN = PullPlan(
    reference=ALPINE.reference,
    digest=ALPINE.digest,
    platform="linux/amd64",
    layers=(
        PlannedLayer("sha256:" + "12" * 32, 3_000_000, 0),
        PlannedLayer("sha256:" + "34" * 32, 5_000_000, 4_000_000),
    ),
    fetch_bytes=4_000_000,
    disk_bytes=19_000_000,
    free_bytes=8_000_000_000,
)


async def test_a_pull_that_is_only_planned_says_what_it_would_fetch(path: Path) -> None:
    answers = {
        requests.Ping: [[responses.Pong(1, ("pull-plan-v1",))]],
        requests.Pull: [[responses.Ok(PLAN)]],
    }
    result, asked = await with_answers(path, answers, "pull", "--dry-run", "alpine")
    assert asked == [requests.Ping(), requests.Pull("alpine", dry_run=True)]
    assert result.stdout.decode().splitlines() == [
        "121212121212 3.0 MB (in the store)",
        "343434343434 5.0 MB",
        f"{ALPINE.reference}: 4.0 MB to fetch, about 19.0 MB of the disk's free 8.0 GB needed",
    ]


async def test_an_agent_that_cannot_plan_is_not_made_to_pull(path: Path) -> None:
    answers = {requests.Ping: [[responses.Pong(1)]]}
    result, asked = await with_answers(path, answers, "pull", "--dry-run", "alpine")
    assert asked == [requests.Ping()]
    assert result.returncode == 1
    assert result.stderr == b"innkeep: this agent cannot say what a pull would fetch\n"


TAR = [bytes([n]) * 70_000 for n in range(3)]
CHUNKS = [
    *(responses.DataChunk(block, done=False) for block in TAR),
    responses.DataChunk(b"", True),
]
BROKEN = [CHUNKS[0], responses.Error("export layer: damaged", "EXPORT_FAILED")]
OTHER = attrs.evolve(
    ALPINE, reference="docker.io/library/other:latest", digest="sha256:" + "ac" * 32
)
LISTED = [[responses.Ok([ALPINE, OTHER, ALPINE])]]


@pytest.mark.parametrize("where", [[], ["-o", "-"]])
async def test_a_layer_goes_to_stdout_byte_for_byte(path: Path, where: list[str]) -> None:
    answers = {requests.ExportLayer: [CHUNKS]}
    result, asked = await with_answers(path, answers, "export-layer", ALPINE.digest, "7", *where)
    assert asked == [requests.ExportLayer(ALPINE.digest, 7)]
    assert result.stdout == b"".join(TAR)
    assert (result.returncode, result.stderr) == (0, b"")


async def test_a_layer_goes_to_a_file_which_is_replaced_when_all_is_there(
    path: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out/layer.tar"
    target.parent.mkdir()
    target.write_text("before")
    arguments = ("export-layer", ALPINE.digest, "0", "-o", str(target))
    async with serving(path, Script({requests.ExportLayer: [BROKEN, CHUNKS]})) as address:
        result = await innkeep("--connect", address, *arguments)
        assert (result.returncode, result.stderr) == (1, b"innkeep: export layer: damaged\n")
        assert target.read_text() == "before"
        result = await innkeep("--connect", address, *arguments)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert target.read_bytes() == b"".join(TAR)
    assert list(target.parent.iterdir()) == [target]


async def test_a_file_that_cannot_be_made_is_one_line(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "missing/layer.tar"
    arguments = ("export-layer", "abab", "0", "-o", str(target))
    result, asked = await with_answers(path, {requests.ListImages: LISTED}, *arguments)
    assert result.returncode == 1
    assert result.stderr.decode() == f"innkeep: {target}: No such file or directory\n"
    assert asked == [requests.ListImages()]


@pytest.mark.parametrize("name", ["abababababab", "sha256:abab", "ab"])
async def test_the_start_of_a_digest_is_enough(path: Path, name: str) -> None:
    answers = {requests.ListImages: LISTED, requests.ExportLayer: [CHUNKS]}
    _, asked = await with_answers(path, answers, "export-layer", name, "0")
    assert asked[-1] == requests.ExportLayer(ALPINE.digest, 0)


async def test_an_image_may_be_named_by_its_reference(path: Path) -> None:
    answers = {
        requests.ListImages: LISTED,
        requests.Query: [[responses.Ok(ALPINE)]],
        requests.ExportLayer: [CHUNKS],
    }
    _, asked = await with_answers(path, answers, "export-layer", "alpine", "0")
    assert asked[1:] == [requests.Query("alpine"), requests.ExportLayer(ALPINE.digest, 0)]


async def test_the_start_of_several_digests_is_refused(path: Path) -> None:
    answers = {requests.ListImages: LISTED}
    result, asked = await with_answers(path, answers, "export-layer", "a", "0")
    assert asked == [requests.ListImages()]
    assert result.returncode == 1
    assert result.stderr == b"innkeep: a is the beginning of several images' digests\n"


async def test_a_layer_is_not_written_to_a_terminal(path: Path) -> None:
    script = Script({requests.ExportLayer: [CHUNKS]})
    ours, theirs = os.openpty()
    try:
        async with serving(path, script) as address:
            command = [sys.executable, "-m", "protocol.cli", "--connect", address]
            result = await trio.run_process(
                [*command, "export-layer", ALPINE.digest, "0"],
                stdout=theirs,
                capture_stderr=True,
                check=False,
                cwd=PROJECT,
            )
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == 2
    assert result.stderr == (
        b"innkeep: this is a tar and no text: give a file with -o, or a pipe\n"
    )
    assert script.requests == []


async def test_layers_are_flattened_topmost_first_and_nothing_is_said(path: Path) -> None:
    answers = {requests.FlattenLayers: [[responses.Ok()]]}
    arguments = ("flatten-layers", "/top", "/below", "-o", "/out")
    result, asked = await with_answers(path, answers, *arguments)
    assert asked == [requests.FlattenLayers(("/top", "/below"), "/out")]
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
