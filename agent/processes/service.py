"""The processes of all connections, and what outlives their commands."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import trio

from agent.errors import cause_of, failing_as
from agent.processes.cgroup import Cgroup, CgroupTree
from agent.processes.collect import OUTPUT_LIMIT_BYTES, Collected, collect, feed
from agent.processes.command import Command
from agent.processes.drain import new_turns
from agent.processes.limits import AppliedLimits, Limits
from agent.processes.oom_protection import OomProtection
from agent.processes.output_log import OutputLog, OutputLogs
from agent.processes.pipes import OutputPipe, adopt
from agent.processes.process import Process, Stdio, kill_all, start_process
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# Programs that are being found and executed at the same time, each in a thread: a file system
# that does not answer holds up nobody but those who use it.
_STARTS_AT_ONCE = 32

_DEATH_S = 2

# How long the thread that has started a command in the VM waits for its end. Most commands of
# hosts' scripts are over by then, and cost one switch between threads instead of four: a quarter of
# the time of `true`. The others begin that much later to be listened to.
_BRIEF_MS = 2


@attrs.define(eq=False)
class Processes:
    """Starts commands, and looks after what they leave behind until the agent ends.

    Made by ``open_processes``. Without a cgroup tree commands run all the same, but only their
    own session's first process group can be killed, and nothing that they left behind.
    """

    tree: CgroupTree | None
    logs: OutputLogs
    lifetime: trio.Nursery
    """Of the agent, for what outlives a connection."""
    limits: AppliedLimits
    _protection: OomProtection
    _turns: trio.Semaphore = attrs.field(factory=new_turns)
    _leaving: dict[Path, trio.Event] = attrs.field(factory=dict)
    """The cgroups that are waited for to be empty; each event comes when its cgroup has gone."""
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
        stdio = Stdio(takes_stdin=stdin_data is not None)
        brief = stdin_data is None and may_be_brief(timeout_s)
        async with self.running(command, stdio, maybe_brief=brief) as process:
            return await collect(
                process,
                stdin_data=stdin_data,
                timeout_s=timeout_s,
                output_limit_bytes=output_limit_bytes,
            )

    @asynccontextmanager
    async def running(
        self,
        command: Command,
        stdio: Stdio,
        *,
        parent: Path | None = None,
        name: str | None = None,
        maybe_brief: bool = False,
    ) -> AsyncIterator[Process]:
        """A process in a cgroup of its own, for as long as the block takes.

        ``parent`` is the cgroup above (without one it is that of all commands in the VM), and
        ``name`` that of its own, if it matters. With ``maybe_brief`` its end is waited for before
        the block begins, for 2 ms at most. Left
        before the process has ended, or cancelled, the block ends with its whole tree dead. What a
        process left behind that ended by itself goes on in the agent's lifetime.

        Raises:
            AgentError: SPAWN_FAILED, if it cannot be started.
        """
        patience_ms = _BRIEF_MS if maybe_brief else 0
        process = await self._start(command, stdio, parent, name, patience_ms)
        try:
            yield process
        finally:
            with trio.CancelScope(shield=True):
                await self._finish(process)

    async def start_background(
        self,
        command: Command,
        *,
        parent: Path | None = None,
        name: str | None = None,
        log_name: str | None = None,
        pid_of: Callable[[Process], Awaitable[int]] | None = None,
        stdin_data: str | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Start a command that outlives its request, with its output in a log; its pid.

        After ``timeout_s`` its whole tree is killed. ``parent`` and ``name`` are as for
        ``running``. The log has the pid's name, or ``log_name``. Where the command is one that
        leaves another process running, ``pid_of`` tells which, and whether that worked.

        Raises:
            AgentError: SPAWN_FAILED, if it cannot be started; what ``pid_of`` raises.
        """
        async with self._logged() as (output, reader):
            stdio = Stdio(takes_stdin=stdin_data is not None, log=output.fifo)
            process = await self._start(command, stdio, parent, name)
            try:
                pid = process.pid if pid_of is None else await pid_of(process)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await process.end_tree()
                    await self._finish(process)
                raise
            # From here on it goes on, whoever hangs up.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(output.name, log_name or str(pid))
                if process.cgroup is not None:
                    with suppress(OSError):  # it has ended, and all is over
                        process.cgroup.keep(_boottime_after(timeout_s))
                        process.cgroup.tell_pid(pid)
                    self.lifetime.start_soon(self._see_off, process.cgroup, timeout_s)
                self.lifetime.start_soon(self._keep_log, output, reader)
                self.lifetime.start_soon(_see_to_background, process, pid, stdin_data)
        return pid

    async def start_kept(
        self,
        command: Command,
        stdio: Stdio,
        *,
        record: Callable[[Process], None],
        pid_of: Callable[[Process], Awaitable[int]],
        parent: Path | None = None,
    ) -> tuple[Process, int]:
        """Start a command that outlives its request and the agent; the process, and its pid.

        The caller waits for it, and then closes it. ``parent`` is as for ``running``, ``pid_of`` as
        for ``start_background``. ``record`` puts down for the next agent that there is a process,
        before that is marked to be kept: what has a mark is known, and what has none is ended.

        Raises:
            AgentError: SPAWN_FAILED, if it cannot be started; what ``pid_of`` raises.
        """
        process = await self._start(command, stdio, parent, None)
        try:
            record(process)
            if process.cgroup is not None:
                with suppress(OSError):  # it has ended, and all is over
                    process.cgroup.keep()
            # It may have begun by then, and is not to end with who waits.
            with trio.CancelScope(shield=True):
                pid = await pid_of(process)
        except BaseException:
            with trio.CancelScope(shield=True):
                await process.end_tree()
                await self._finish(process)
            raise
        if process.cgroup is not None:
            with suppress(OSError):  # it has ended, and all is over
                process.cgroup.tell_pid(pid)
            self.lifetime.start_soon(self._see_off, process.cgroup)
        return process, pid

    @asynccontextmanager
    async def _logged(self) -> AsyncIterator[tuple[OutputLog, OutputPipe]]:
        """A new log and the end to read from; both are gone again if the block raises.

        Raises:
            AgentError: INTERNAL_ERROR; there is no place for it.
        """
        output = await trio.to_thread.run_sync(self.logs.new)
        try:
            with failing_as(ErrorCode.INTERNAL_ERROR, f"open {output.fifo}"):
                reader = output.open_reader()
            try:
                yield output, reader
            except BaseException:
                reader.close()
                raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(output.remove)
            raise

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
        with trio.move_on_after(_DEATH_S):
            await kill_all(workloads)

    async def _start(
        self,
        command: Command,
        stdio: Stdio,
        parent: Path | None,
        name: str | None,
        patience_ms: int = 0,
    ) -> Process:
        if parent is None and self.tree is not None:
            parent = self.tree.commands
        return await trio.to_thread.run_sync(
            self._launch, command, stdio, parent, name, patience_ms, limiter=self._starts
        )

    def _launch(
        self,
        command: Command,
        stdio: Stdio,
        parent: Path | None,
        name: str | None,
        patience_ms: int,
    ) -> Process:
        cgroup = None
        if parent is not None:
            with failing_as(ErrorCode.SPAWN_FAILED, f"start {command.argv[0]}"):
                cgroup = Cgroup.make(parent, name)
        try:
            if cgroup is not None:
                with failing_as(ErrorCode.SPAWN_FAILED, f"limit {command.argv[0]}"):
                    self.limits.limit_command(cgroup.path)
            process = start_process(command, stdio, cgroup, self._turns, self._protection)
        except BaseException:
            if cgroup is not None:
                cgroup.remove()
            raise
        if patience_ms:
            process.wait_briefly(patience_ms)
        return process

    async def _finish(self, process: Process) -> None:
        has_ended_itself = process.exit_code is not None
        if not has_ended_itself:
            await process.end_tree()
            process.close_outputs()
        # What it left behind may wait for the end of its input.
        if process.stdin is not None:
            process.stdin.close()
        cgroup_is_gone = process.cgroup is None or process.cgroup.remove()
        pipes_are_done = not any(pipe.is_open for pipe in process.outputs.values())
        if process.exit_code is not None and cgroup_is_gone and pipes_are_done:
            process.close()
            return
        if self.lifetime.cancel_scope.cancel_called:
            # It is stuck in the kernel, and the agent is about to end.
            process.close()
            return
        if process.cgroup is not None and not cgroup_is_gone and has_ended_itself:
            process.cgroup.keep()
        self.lifetime.start_soon(self._outlive, process)

    async def _keep_log(self, output: OutputLog, reader: OutputPipe) -> None:
        try:
            await self.logs.follow(output, reader)
            await trio.to_thread.run_sync(output.end)
            await trio.to_thread.run_sync(self.logs.tidy)
        finally:
            reader.close()
            output.close()

    def adopt(self) -> None:
        """Look after what an earlier agent left in ``commands``, and end what died with it."""
        self.logs.forget_unfinished()
        for name in self.logs.unended():
            output = self.logs.of(name)
            try:
                self.lifetime.start_soon(self._keep_log, output, output.open_reader())
            except OSError as error:
                log.error("read %s: %s", output.fifo, cause_of(error))
        if self.tree is None:
            return
        for cgroup in self.tree.all():
            # Containers that stay are looked after by those who know them.
            if not (self.tree.is_container(cgroup) and cgroup.is_kept()):
                self.adopt_command(cgroup)

    def adopt_command(self, cgroup: Cgroup) -> None:
        """Look after one command of an earlier agent, or end it if its request went with that."""
        timeout_s: float | None = 0
        if cgroup.is_kept():
            timeout_s = _time_left(cgroup.kept_until())
            for pipe in adopt(cgroup.pids()):
                self.lifetime.start_soon(_drop, pipe)
        self.lifetime.start_soon(self._see_off, cgroup, timeout_s)

    async def seen_off(self, parent: Path, *, but: str | None = None) -> None:
        """Return when the cgroups in ``parent`` that go when they are empty have gone.

        ``but`` is the name of one that is not waited for. To remove one from under who waits for it
        is to leave that waiting: the kernel's word that it is empty comes up to 10 ms late, and
        not at all when there is no such cgroup any more.
        """
        while leaving := [
            gone
            for path, gone in self._leaving.items()
            if path.parent == parent and path.name != but
        ]:
            await leaving[0].wait()

    async def _outlive(self, process: Process) -> None:
        """Drop what is still written, and clean up when nobody is left to write."""
        try:
            async with trio.open_nursery() as nursery:
                for pipe in process.outputs.values():
                    nursery.start_soon(_drop, pipe)
                await process.wait()
                if process.cgroup is not None:
                    await self._see_off(process.cgroup)
        finally:
            process.close()

    async def _see_off(self, cgroup: Cgroup, timeout_s: float | None = None) -> None:
        """Remove a cgroup when it is empty; after ``timeout_s`` what still runs there is killed."""
        gone = self._leaving[cgroup.path] = trio.Event()
        try:
            if timeout_s is not None:
                with trio.move_on_after(timeout_s) as limit:
                    await cgroup.emptied()
                if limit.cancelled_caught:
                    await kill_all(cgroup)
            await cgroup.removed()
        except OSError as error:
            log.error("remove %s: %s", cgroup.path, cause_of(error))
        finally:
            del self._leaving[cgroup.path]
            gone.set()


@asynccontextmanager
async def open_processes(
    cgroup_root: Path | None,
    logs: Path,
    *,
    limits: Limits | None = None,
    protection: OomProtection | None = None,
) -> AsyncIterator[Processes]:
    """The service, with its commands' cgroups below a directory of cgroup2, or without any.

    ``logs`` is the directory for the output of what runs in the background; ``limits`` are applied
    to the cgroups, and ``protection`` is what commands must not inherit. Leaving the block stops
    looking after what commands left behind, and does not end it: ``stop_all`` does. What an earlier
    agent left there is looked after; what it ran in the foreground, whose connections went with
    it, is ended.
    """
    tree = None
    if cgroup_root is not None:
        try:
            tree = CgroupTree.open(cgroup_root)
        except OSError as error:
            log.warning("commands have no cgroups: %s", cause_of(error))
    try:
        async with trio.open_nursery() as lifetime:
            processes = Processes(
                tree=tree,
                logs=OutputLogs(logs),
                lifetime=lifetime,
                limits=AppliedLimits()
                if tree is None or limits is None
                else limits.apply(tree.workloads.path),
                protection=protection or OomProtection(),
            )
            processes.adopt()
            yield processes
            lifetime.cancel_scope.cancel()
    finally:
        if tree is not None:
            tree.close()


async def _see_to_background(process: Process, pid: int, stdin_data: str | None) -> None:
    """Feed a background command and reap it."""
    try:
        async with trio.open_nursery() as feeding:
            if process.stdin is not None:
                feeding.start_soon(feed, process.stdin, (stdin_data or "").encode())
            status = await process.wait()
            if pid == process.pid:
                log.info("background process %d ended with %d", pid, status)
    finally:
        process.close()


def may_be_brief(timeout_s: float | None) -> bool:
    """Whether a command's end may be waited for a moment before its time limit is looked at."""
    return timeout_s is None or timeout_s >= 1


async def _drop(pipe: OutputPipe) -> None:
    try:
        while await pipe.receive():
            pass
    finally:
        pipe.close()


def _boottime_after(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.clock_gettime(time.CLOCK_BOOTTIME) + timeout_s


def _time_left(until: float | None) -> float | None:
    if until is None:
        return None
    return max(0.0, until - time.clock_gettime(time.CLOCK_BOOTTIME))
