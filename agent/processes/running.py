"""A command in a container, as crun runs it: its start, its end, and why there was neither."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import trio

from agent.errors import AgentError
from agent.processes.collect import OUTPUT_LIMIT_BYTES, Collected, collect
from agent.processes.command import Bind, ContainerCommand
from agent.processes.crun import Invocation
from agent.processes.process import Process
from protocol.errors import ErrorCode


@attrs.frozen
class Running:
    """A command in a container: its process is crun's, which ends with the command's exit code."""

    process: Process
    _invocation: Invocation
    _command: ContainerCommand
    _binds: Sequence[Bind]

    async def started(self) -> None:
        """Wait until the command is about to be executed.

        Raises:
            AgentError: RUN_FAILED or MOUNT_FAILED, with the cause: it will not be.
        """
        if not await self._invocation.started(self.process):
            raise await trio.to_thread.run_sync(self.failure)

    async def pid(self) -> int:
        """Its number in the VM; as ``started``."""
        await self.started()
        assert self._invocation.pid is not None
        return self._invocation.pid

    async def collect(
        self,
        *,
        stdin_data: str | None = None,
        timeout_s: float | None = None,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> Collected:
        """See it to its end, as ``collect`` does; raises as ``started``."""
        collected = await collect(
            self.process,
            stdin_data=stdin_data,
            timeout_s=timeout_s,
            output_limit_bytes=output_limit_bytes,
        )
        # A crun that was killed may have left the pid untold of a command that ran.
        ended_by_us_or_others = collected.outcome.timed_out or self.process.was_killed
        if not ended_by_us_or_others and not self._invocation.has_started():
            raise await trio.to_thread.run_sync(self.failure)
        return collected

    def failure(self) -> AgentError:
        """Why crun ended without having started anything, by its own words. Blocks."""
        said = self._invocation.complaint()
        if "mount" in said or "creating" in said:
            for bind in self._binds:
                # Some of crun's words are about the path as seen from the root.
                if f"`{bind.destination}`" in said or f"`{bind.destination[1:]}`" in said:
                    return AgentError(ErrorCode.MOUNT_FAILED, f"{bind.mounting}: {said}")
        doing = f"run {self._command.argv[0]}"
        said = said or "crun failed and did not say why"
        return AgentError(ErrorCode.RUN_FAILED, f"{doing}: {said}")


async def pid_of_detached(invocation: Invocation, command: ContainerCommand, crun: Process) -> int:
    """The pid of what crun leaves running when it ends, as it must at once.

    Raises:
        AgentError: RUN_FAILED or MOUNT_FAILED; it left nothing.
    """
    status = await crun.wait()
    if status == 0 and invocation.has_started() and invocation.pid is not None:
        return invocation.pid
    running = Running(crun, invocation, command, command.binds)
    raise await trio.to_thread.run_sync(running.failure)
