"""``innkeep resumed``: what it tells the VM, and how it says what came of it."""

import json
import time
from pathlib import Path

import pytest

from protocol import requests, responses
from protocol.values import ClockStep, MountCheck, NetworkCheck, Reseeding, Resumption
from tests.protocol.command_line import with_answers

WELL = Resumption(
    ok=True,
    clock=ClockStep(ok=True, source="request", step_ns=428_839_703_417),
    randomness=Reseeding(ok=True, source="request", credited_bytes=64),
    mounts=MountCheck(ok=True, checked=("/mnt/virtiofs/home", "/storage")),
    network=NetworkCheck(ok=True),
)
BADLY = Resumption(
    ok=False,
    clock=ClockStep(ok=True, source=None, step_ns=0),
    randomness=Reseeding(ok=False, source=None, credited_bytes=0, error="no bytes from the host"),
    mounts=MountCheck(ok=False, checked=("/storage",), error="/storage: Read-only file system"),
    network=NetworkCheck(ok=False, error="the VM has no network interface"),
)


@pytest.mark.parametrize(
    ("done", "lines", "status"),
    [
        (
            WELL,
            [
                "clock       stepped by +428.840 s (request)",
                "randomness  64 bytes (request)",
                "mounts      /mnt/virtiofs/home, /storage",
                "network     as configured",
            ],
            0,
        ),
        (
            BADLY,
            [
                "clock       right (nobody told a time)",
                "randomness  no bytes from the host",
                "mounts      /storage: Read-only file system",
                "network     the VM has no network interface",
            ],
            1,
        ),
    ],
)
async def test_every_step_is_told_and_the_status_says_whether_all_went_well(
    tmp_path: Path, done: Resumption, lines: list[str], status: int
) -> None:
    before_ns = time.time_ns()
    answers = {requests.Resumed: [[responses.Ok(done)]]}
    result, asked = await with_answers(tmp_path / "agent.sock", answers, "resumed")
    (request,) = asked
    assert isinstance(request, requests.Resumed)
    assert request.time_ns is not None
    assert before_ns <= request.time_ns <= time.time_ns()
    assert request.entropy is not None
    assert len(request.entropy) == 64
    assert result.stdout.decode().splitlines() == lines
    assert result.returncode == status


async def test_the_time_may_be_kept_back_and_the_bytes_are_never_the_same(tmp_path: Path) -> None:
    answers = {requests.Resumed: [[responses.Ok(WELL)]]}
    told = []
    for name in ("one", "two"):
        words = ("--json", "resumed", "--keep-time")
        result, (request,) = await with_answers(tmp_path / name, answers, *words)
        assert json.loads(result.stdout)["clock"]["step_ns"] == 428_839_703_417
        assert isinstance(request, requests.Resumed)
        assert request.time_ns is None
        told.append(request.entropy)
    assert told[0] != told[1]
