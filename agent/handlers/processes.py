"""Commands in the VM itself."""

from __future__ import annotations

from agent.channel import Channel
from agent.handlers.execution import Mode, completed, converse, running_as, seconds
from agent.processes.command import Command
from agent.processes.process import Stdio
from agent.processes.service import may_be_brief
from agent.services import Services
from protocol import AgentResponse, requests


async def vm_exec(request: requests.VmExec, channel: Channel, services: Services) -> AgentResponse:
    command = Command.from_request(
        request.command, request.env, request.workdir, defaults=services.bridges.environment
    )
    timeout_s = seconds(request.timeout_ms)
    processes = services.processes
    mode = Mode.of(request)
    if mode is Mode.INTERACTIVE:
        stdio = Stdio(takes_stdin=True, terminal=request.tty)
        brief = may_be_brief(timeout_s) and not request.tty
        async with processes.running(command, stdio, maybe_brief=brief) as process:
            return await converse(request, channel, process)
    if mode is Mode.BACKGROUND:
        pid = await processes.start_background(
            command, stdin_data=request.stdin_data, timeout_s=timeout_s
        )
        return running_as(pid)
    return completed(
        await processes.execute(command, stdin_data=request.stdin_data, timeout_s=timeout_s)
    )
