"""``innkeep`` as a program, and what the agents of its tests answer."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from protocol import AgentRequest, AgentResponse, responses
from protocol.values import ImageInfo
from tests.protocol.fake_agent import Answers, Script, serving

ALPINE = ImageInfo(
    reference="docker.io/library/alpine:latest",
    digest="sha256:" + "ab" * 32,
    size=7_800_000,
    created="2025-01-01T00:00:00Z",
    architecture="amd64",
    os="linux",
    layer_count=1,
    layers=("sha256:" + "cd" * 32,),
    cmd=("/bin/sh",),
    env=("PATH=/bin",),
)
ABSENT: AgentResponse = responses.Error("image not found: alpine", "NOT_FOUND")
DONE: AgentResponse = responses.Completed(0, b"out\n", b"")
PULLED: list[AgentResponse] = [
    responses.Progress("Pulling layer 1/1", 50, "cd"),
    responses.Ok(ALPINE),
]
PROJECT = Path(__file__).parents[2]


async def innkeep(*arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Run the command line to its end, without an address of its own."""
    environ = {name: value for name, value in os.environ.items() if name != "INNKEEP_CONNECT"}
    return await trio.run_process(
        [sys.executable, "-m", "protocol.cli", *arguments],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        cwd=PROJECT,
        env={**environ, "COLUMNS": "80", **(env or {})},
    )


async def with_answers(
    path: Path, answers: Answers, *arguments: str, **env: str
) -> tuple[Any, list[AgentRequest]]:
    """Run it against an agent that gives fixed answers; its result, and what it asked."""
    script = Script(answers)
    async with serving(path, script) as address:
        result = await innkeep("--connect", address, *arguments, env=env)
    return result, script.requests
