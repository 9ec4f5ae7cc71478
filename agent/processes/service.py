"""The processes of all connections, and what outlives their commands."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import trio

from agent.errors import cause_of
from agent.processes.cgroup import Cgroup, CgroupTree
from agent.processes.collect import OUTPUT_LIMIT_BYTES, Collected, collect
from agent.processes.command import Command
from agent.processes.pipes import OutputPipe
from agent.processes.process import Process, start_process

log = logging.getLogger(__name__)

# Programs that are being found and executed at the same time, each in a thread: a file system
# that does not answer holds up nobody but those who use it.
_STARTS_AT_ONCE = 32

_DEATH_S = 2


@attrs.define(eq=False)
class Processes:
    """Starts commands, and looks after what they leave behind until the agent ends.

    Made by ``open_processes``. Without a cgroup tree commands run all the same, but only their
    own session's first process group can be killed, and nothing that they left behind.
    """

    tree: CgroupTree | None
    _lifetime: trio.Nursery
    _starts: trio.CapacityLimiter = attrs.field(
        factory=partial(trio.CapacityLimiter, _STARTS_AT_ONCE)
    )

    async def execute(
        self,
        command: Command,
        *,
        stdin_data: str | None = None,
        timeout_s: float | None = None,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> Collected:
        """Run a command in the VM to its end; cancelled, it leaves nothing running.

        Raises:
            AgentError: SPAWN_FAILED, if it cannot be started.
        """
        parent = self.tree.commands if self.tree is not None else None
        takes_stdin = stdin_data is not None
        async with self.running(command, parent=parent, takes_stdin=takes_stdin) as process:
            return await collect(
                process,
                stdin_data=stdin_data,
                timeout_s=timeout_s,
                output_limit_bytes=output_limit_bytes,
            )

    @asynccontextmanager
    async def running(
        self, command: Command, *, parent: Path | None, takes_stdin: bool
    ) -> AsyncIterator[Process]:
        """A process in a cgroup of its own below ``parent``, for as long as the block takes.

        Left before the process has ended, or cancelled, the block ends with its whole tree dead.
        What a process left behind that ended by itself goes on in the agent's lifetime.

        Raises:
            AgentError: SPAWN_FAILED, if it cannot be started.
        """
        process = await trio.to_thread.run_sync(
            partial(start_process, command, parent=parent, takes_stdin=takes_stdin),
            limiter=self._starts,
        )
        try:
            yield process
        finally:
            with trio.CancelScope(shield=True):
                await self._finish(process)

    async def _finish(self, process: Process) -> None:
        if process.exit_code is None:
            await process.end_tree()
            process.stdout.close()
            process.stderr.close()
        cgroup_is_gone = process.cgroup is None or process.cgroup.remove()
        pipes_are_done = not (process.stdout.is_open or process.stderr.is_open)
        if process.exit_code is not None and cgroup_is_gone and pipes_are_done:
            process.close()
        else:
            self._lifetime.start_soon(_outlive, process)

    async def stop_all(self, grace_s: float) -> None:
        """End every command and container, whoever started it: TERM, and KILL after ``grace_s``.

        Refuse new ones before. Takes at most 2 s more than the grace.
        """
        if self.tree is None:
            return
        workloads = self.tree.workloads
        workloads.terminate()
        with trio.move_on_after(grace_s):
            await workloads.emptied()
        workloads.kill()
        with trio.move_on_after(_DEATH_S):
            await workloads.emptied()


@asynccontextmanager
async def open_processes(cgroup_root: Path | None) -> AsyncIterator[Processes]:
    """The service, with its commands' cgroups below a directory of cgroup2, or without any.

    Leaving the block stops looking after what commands left behind, and does not end it:
    ``stop_all`` does. What an earlier agent left is looked after, and its containers, whose
    connections went with it, are ended.
    """
    tree = None
    if cgroup_root is not None:
        try:
            tree = CgroupTree.open(cgroup_root)
        except OSError as error:
            log.warning("commands have no cgroups: %s", cause_of(error))
    try:
        async with trio.open_nursery() as lifetime:
            if tree is not None:
                for cgroup in Cgroup.all_in(tree.containers):
                    cgroup.kill()
                for cgroup in Cgroup.all_in(tree.containers) + Cgroup.all_in(tree.commands):
                    lifetime.start_soon(_remove, cgroup)
            yield Processes(tree=tree, lifetime=lifetime)
            lifetime.cancel_scope.cancel()
    finally:
        if tree is not None:
            tree.close()


async def _outlive(process: Process) -> None:
    """Drop what is still written, and clean up when nobody is left to write."""
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drop, process.stdout)
            nursery.start_soon(_drop, process.stderr)
            await process.wait()
            if process.cgroup is not None:
                await _remove(process.cgroup)
    finally:
        process.close()


async def _drop(pipe: OutputPipe) -> None:
    while await pipe.receive():
        pass


async def _remove(cgroup: Cgroup) -> None:
    try:
        await cgroup.removed()
    except OSError as error:
        log.error("remove %s: %s", cgroup.path, cause_of(error))
