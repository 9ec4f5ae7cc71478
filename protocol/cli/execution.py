"""What ``run`` and ``exec`` do: commands in the VM, with docker's habits."""

import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from typing import Final

from protocol import decode_value, requests, responses
from protocol.cli.connection import AGENT_ERRORS, CommandFailed, Settings, converse
from protocol.cli.output import print_json
from protocol.cli.pull import pull
from protocol.client import AgentClient, expect
from protocol.errors import ErrorCode
from protocol.values import U64_MAX, EnvVar, ImageInfo

_AGENT_FAILED: Final = 125
"""docker's exit code for a command that never ran."""


class PullPolicy(StrEnum):
    """When ``run`` pulls the image."""

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"


def environment(assignments: Iterable[str]) -> tuple[EnvVar, ...]:
    """``K=V`` as it is; ``K`` alone from our own environment, or not at all, as docker has it."""
    variables = []
    for assignment in assignments:
        name, given, value = assignment.partition("=")
        if not name:
            raise CommandFailed(f"not an environment variable: {assignment!r}", exit_code=2)
        if given:
            variables.append((name, value))
        elif name in os.environ:
            variables.append((name, os.environ[name]))
    return tuple(variables)


def milliseconds(seconds: float | None) -> int | None:
    """A time limit as the wire has it."""
    return None if seconds is None else min(round(seconds * 1000), U64_MAX)


def execute(settings: Settings, request: requests.VmExec) -> int:
    """Run a command in the VM itself; the exit code to end with."""

    async def conversation(client: AgentClient) -> responses.Completed:
        return await client.ask(request, responses.Completed)

    return _finish(settings, conversation)


def run(settings: Settings, request: requests.Run, platform: str | None, policy: PullPolicy) -> int:
    """Run a command in a container, pulling the image by policy; the exit code to end with."""

    async def conversation(client: AgentClient) -> responses.Completed:
        if policy is PullPolicy.ALWAYS or (
            policy is PullPolicy.MISSING
            and platform is not None
            and not await _is_stored(client, request.image, platform)
        ):
            await pull(client, request.image, platform)
        answer = await client.request(request)
        if policy is PullPolicy.MISSING and _is_absent(answer):
            await pull(client, request.image, platform)
            answer = await client.request(request)
        return expect(answer, responses.Completed)

    return _finish(settings, conversation)


async def _is_stored(client: AgentClient, image: str, platform: str) -> bool:
    """Whether the store's image of this name is one for the platform."""
    answer = await client.request(requests.Query(image))
    if _is_absent(answer):
        return False
    info = decode_value(expect(answer, responses.Ok).data, ImageInfo)
    return platform.split("/")[:2] == [info.os, info.architecture]


def _is_absent(answer: responses.AgentResponse) -> bool:
    return isinstance(answer, responses.Error) and answer.code == ErrorCode.NOT_FOUND


def _finish(
    settings: Settings, conversation: Callable[[AgentClient], Awaitable[responses.Completed]]
) -> int:
    try:
        completed = converse(settings, conversation)
    except AGENT_ERRORS as error:
        raise CommandFailed(str(error), _AGENT_FAILED) from error
    if settings.json:
        print_json(completed)
        return completed.exit_code
    for stream, data in ((sys.stdout, completed.stdout), (sys.stderr, completed.stderr)):
        stream.buffer.write(data)
        stream.flush()
    return completed.exit_code
