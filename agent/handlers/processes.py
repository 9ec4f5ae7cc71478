"""Commands in the VM itself."""

from __future__ import annotations

from agent.channel import Channel
from agent.errors import AgentError
from agent.processes.collect import Collected
from agent.processes.command import Command
from agent.services import Services
from protocol import AgentResponse, requests, responses
from protocol.errors import ErrorCode


async def vm_exec(request: requests.VmExec, channel: Channel, services: Services) -> AgentResponse:
    refuse_modes(request, ("interactive", "tty", "background"))
    command = Command.from_request(request.command, request.env, request.workdir)
    collected = await services.processes.execute(
        command, stdin_data=request.stdin_data, timeout_s=seconds(request.timeout_ms)
    )
    return completed(collected)


def refuse_modes(request: requests.VmExec | requests.Run, modes: tuple[str, ...]) -> None:
    """Raise INVALID_REQUEST for a way of running that this version does not offer."""
    for mode in modes:
        if getattr(request, mode):
            raise AgentError(ErrorCode.INVALID_REQUEST, f"{mode}: not supported by this version")


def seconds(timeout_ms: int | None) -> float | None:
    """A time limit as trio takes it; None is none."""
    return None if timeout_ms is None else timeout_ms / 1000


def completed(collected: Collected) -> responses.Completed:
    """The answer to a plain run."""
    return responses.Completed(
        exit_code=collected.exit_code,
        stdout=collected.stdout,
        stderr=collected.stderr,
        stdout_truncated=collected.stdout_truncated,
        stderr_truncated=collected.stderr_truncated,
    )
