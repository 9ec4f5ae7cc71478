"""What ``run`` and ``exec`` do: commands in the VM, with docker's habits."""

import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from typing import Final

import attrs

from protocol import decode_value, requests, responses
from protocol.cli.attach import attach
from protocol.cli.connection import AGENT_ERRORS, CommandFailed, Settings, converse
from protocol.cli.output import print_json
from protocol.cli.pull import pull
from protocol.client import AgentClient, expect
from protocol.errors import ErrorCode
from protocol.values import U64_MAX, EnvVar, ImageInfo, Mount

_AGENT_FAILED: Final = 125
"""docker's exit code for a command that never ran."""
_NO_TERMINAL: Final = 1
_USAGE: Final = 2

Command = requests.Run | requests.VmExec


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
            raise CommandFailed(f"not an environment variable: {assignment!r}", _USAGE)
        if given:
            variables.append((name, value))
        elif name in os.environ:
            variables.append((name, os.environ[name]))
    return tuple(variables)


def milliseconds(seconds: float | None) -> int | None:
    """A time limit as the wire has it."""
    return None if seconds is None else min(round(seconds * 1000), U64_MAX)


def mounts(volumes: Iterable[str]) -> tuple[Mount, ...]:
    """``TAG|DIR:PATH[:ro]``, as the wire has it."""
    return tuple(map(_mount, volumes))


def _mount(volume: str) -> Mount:
    match volume.split(":"):
        case [tag, path] if tag and path.startswith("/"):
            return Mount(tag, path, read_only=False)
        case [tag, path, "ro"] if tag and path.startswith("/"):
            return Mount(tag, path, read_only=True)
    raise CommandFailed(
        f"not a volume: {volume!r}; TAG|DIR:PATH[:ro] is expected, with an absolute PATH", _USAGE
    )


def execute(settings: Settings, request: requests.VmExec) -> int:
    """Run a command in the VM itself; the exit code to end with.

    ``interactive`` is whether it gets our input.
    """

    async def conversation(client: AgentClient) -> responses.AgentResponse:
        return await _ask(settings, client, request)

    return _finish(settings, request, conversation)


def run(settings: Settings, request: requests.Run, platform: str | None, policy: PullPolicy) -> int:
    """The same in a container, pulling the image by policy."""

    async def conversation(client: AgentClient) -> responses.AgentResponse:
        if policy is PullPolicy.ALWAYS or (
            policy is PullPolicy.MISSING
            and platform is not None
            and not await _is_stored(client, request.image, platform)
        ):
            await pull(client, request.image, platform)
        answer = await _ask(settings, client, request)
        if policy is PullPolicy.MISSING and _is_absent(answer):
            await pull(client, request.image, platform)
            answer = await _ask(settings, client, request)
        return answer

    return _finish(settings, request, conversation)


async def _is_stored(client: AgentClient, image: str, platform: str) -> bool:
    """Whether the store's image of this name is one for the platform."""
    answer = await client.request(requests.Query(image))
    if _is_absent(answer):
        return False
    info = decode_value(expect(answer, responses.Ok).data, ImageInfo)
    return platform.split("/")[:2] == [info.os, info.architecture]


def _is_absent(answer: responses.AgentResponse) -> bool:
    return isinstance(answer, responses.Error) and answer.code == ErrorCode.NOT_FOUND


async def _ask(
    settings: Settings, client: AgentClient, request: Command
) -> responses.AgentResponse:
    """Have the command run, with our streams where it is to have them; the last answer."""
    if settings.json or _is_left_behind(request):
        return await client.request(request)
    attached = attrs.evolve(request, interactive=True)
    return await attach(client, attached, with_input=request.interactive)


def _is_left_behind(request: Command) -> bool:
    return request.background or (isinstance(request, requests.Run) and request.detached)


def _check(settings: Settings, request: Command) -> None:
    """Refuse options that do not go together, or not with our input."""
    is_detached = isinstance(request, requests.Run) and request.detached
    if is_detached and request.background:
        raise CommandFailed("--detach and --background exclude each other", _USAGE)
    if not (request.interactive or request.tty):
        return
    if _is_left_behind(request):
        left = "--detach" if is_detached else "--background"
        raise CommandFailed(f"{left} takes neither --interactive nor --tty", _USAGE)
    if settings.json:
        raise CommandFailed("--json takes neither --interactive nor --tty", _USAGE)
    has_terminal = sys.stdin is not None and sys.stdin.isatty()
    if request.interactive and request.tty and not has_terminal:
        raise CommandFailed("the input device is not a TTY", _NO_TERMINAL)


def _finish(
    settings: Settings,
    request: Command,
    conversation: Callable[[AgentClient], Awaitable[responses.AgentResponse]],
) -> int:
    _check(settings, request)
    try:
        answer = converse(settings, conversation)
        if isinstance(answer, responses.Exited):
            return answer.exit_code
        completed = expect(answer, responses.Completed)
    except AGENT_ERRORS as error:
        raise CommandFailed(str(error), _AGENT_FAILED) from error
    if settings.json:
        print_json(completed)
    else:
        print(completed.stdout.decode(errors="replace"))
    return completed.exit_code
