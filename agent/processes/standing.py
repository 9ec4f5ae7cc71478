"""Containers that stay: one for each persistent overlay, which its commands share.

    containers/<id>/config.json …   its bundle, named as crun knows it
                    container.json  what is known of it besides: `Record`

Its first process is the agent's own init, which outlives the commands, or a detached command. It
has a cgroup, and each command that joins it one of its own beside it, so that a command's end or
time limit is its own alone. All of it outlives the agent: the next one takes it over.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError, cause_of, failing_as
from agent.processes.binding import bind_into
from agent.processes.bundle import INIT_PATH
from agent.processes.cgroup import Cgroup
from agent.processes.command import Bind, ContainerCommand
from agent.processes.container import ContainerRuntime
from agent.processes.process import kill_all
from agent.processes.standing_container import (
    FIRST,
    Record,
    StandingContainer,
    start_ticks,
    taken_over,
)
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# Debian's catatonit, linked statically: it reaps and waits, without a child of its own.
INIT = "/usr/bin/catatonit"

_DEATH_S = 2


@attrs.define(eq=False)
class StandingContainers:
    """Starts, joins and replaces them. Made by ``open``."""

    _runtime: ContainerRuntime
    _init: str
    _by_workload: dict[str, list[StandingContainer]] = attrs.field(factory=dict)
    _turns: dict[str, trio.Lock] = attrs.field(factory=dict)

    @classmethod
    def open(cls, runtime: ContainerRuntime, *, init: str = INIT) -> StandingContainers:
        """The service; containers of an earlier agent are taken over, what is left of others goes.

        Blocks shortly. Raises OSError.
        """
        if not Path(init).is_file():
            log.warning("there is no %s: containers cannot outlive their commands", init)
        containers = cls(runtime=runtime, init=init)
        tree = runtime.processes.tree
        if tree is None:
            return containers
        known = set()
        for directory in sorted(runtime.directory.iterdir(), key=lambda path: path.stat().st_ctime):
            container = taken_over(directory, runtime)
            if container is None:
                runtime.forget(directory)
                continue
            known.add(container.id)
            for cgroup in Cgroup.all_in(container.cgroup.path):
                runtime.processes.adopt_command(cgroup)
            containers._add(container)
        for parent in (tree.containers, tree.privileged):
            for cgroup in Cgroup.all_in(parent):
                if cgroup.is_kept() and cgroup.path.name not in known:
                    cgroup.kill()
                    runtime.processes.lifetime.start_soon(_remove, cgroup)
        return containers

    @asynccontextmanager
    async def joined(
        self,
        workload: str,
        command: ContainerCommand,
        rootfs: Callable[[], Awaitable[Path]],
    ) -> AsyncIterator[StandingContainer]:
        """The newest container of a workload, for a command to join while the block lasts.

        Where none runs one is started, on what ``rootfs`` mounts; callers at once share it. What
        ``command`` has mounted is there, too.

        Raises:
            AgentError: RUN_FAILED or MOUNT_FAILED; what ``rootfs`` raises.
        """
        async with self._turn(workload):
            container = await self._found_or_started(workload, command, rootfs)
            container.enter()
        try:
            yield container
        finally:
            container.leave()

    async def _found_or_started(
        self,
        workload: str,
        command: ContainerCommand,
        rootfs: Callable[[], Awaitable[Path]],
    ) -> StandingContainer:
        while (running := self.newest(workload)) is not None:
            try:
                await self._bind(running, command)
            except AgentError:
                if running.has_ended:
                    continue
                raise
            return running
        return await self._start_idle(workload, command, await rootfs())

    async def start_detached(
        self,
        workload: str,
        command: ContainerCommand,
        rootfs: Callable[[], Awaitable[Path]],
    ) -> str:
        """Start a container whose first process is ``command``; its id.

        One that holds nothing but the agent's own init is replaced; beside any other it is a
        second one on the same overlay, and the one that is joined from now on.

        Raises:
            AgentError: as ``joined``.
        """
        async with self._turn(workload):
            where = await rootfs()
            newest = self.newest(workload)
            if newest is not None and newest.is_idle():
                await self._end(newest)
            container = await self._start(workload, command, where, is_ours=False)
        return container.id

    async def renew(self, bind: Bind) -> None:
        """Mount ``bind`` again where an earlier agent has: its source is another one by now.

        To be called before any command joins. What fails is logged.
        """

        async def mount(container: StandingContainer) -> None:
            try:
                await self._runtime.in_thread(
                    partial(bind_into, container.pid, bind, replaces=True)
                )
            except AgentError as error:
                if not container.has_ended:
                    log.error("%s", error.message)

        async with trio.open_nursery() as nursery:
            for container in chain.from_iterable(self._by_workload.values()):
                if container.binds.get(bind.destination) == bind:
                    nursery.start_soon(mount, container)

    @asynccontextmanager
    async def released(self, workload: str) -> AsyncIterator[None]:
        """Keep everybody else from a workload, with its idle containers ended, for the block."""
        async with self._turn(workload):
            for container in self.of(workload):
                if container.has_ended or container.is_idle():
                    await self._end(container)
            yield

    async def end_idle(self) -> None:
        """End all containers that hold nothing but the agent's own init; others, when they do.

        Those are to be asked to end: the init, which would do so at once and take the rest with it,
        does not hear of that.
        """
        async with trio.open_nursery() as nursery:
            for container in chain.from_iterable(self._by_workload.values()):
                if container.is_idle():
                    nursery.start_soon(self._end, container)
                elif container.has_own_init:
                    container.suspend()
                    self._runtime.processes.lifetime.start_soon(self._end_when_idle, container)

    def all(self) -> list[StandingContainer]:
        """Those of all workloads that run; the end of one may not be seen to yet."""
        return list(chain.from_iterable(self._by_workload.values()))

    def of(self, workload: str) -> list[StandingContainer]:
        """Those of a workload that run, the newest last; the end of one may not be seen to yet."""
        return list(self._by_workload.get(workload, ()))

    def newest(self, workload: str) -> StandingContainer | None:
        """The one that a command of a workload would join. From any thread."""
        return next((each for each in reversed(self.of(workload)) if not each.has_ended), None)

    async def _start_idle(
        self, workload: str, command: ContainerCommand, rootfs: Path
    ) -> StandingContainer:
        idle = attrs.evolve(
            command,
            argv=(INIT_PATH, "-P"),
            environment={},
            directory="/",
            user="0:0",
            binds=(*command.binds, Bind(self._init, INIT_PATH, read_only=True)),
        )
        return await self._start(workload, idle, rootfs, is_ours=True)

    async def _start(
        self, workload: str, command: ContainerCommand, rootfs: Path, *, is_ours: bool
    ) -> StandingContainer:
        # A host that hangs up meanwhile leaves a container, or none, but not half of one.
        with trio.CancelScope(shield=True):
            container = await self._make(workload, command, rootfs, is_ours=is_ours)
        self._add(container)
        log.info("container %s runs for %s", container.id, workload)
        return container

    async def _make(
        self, workload: str, command: ContainerCommand, rootfs: Path, *, is_ours: bool
    ) -> StandingContainer:
        parent = self._runtime.cgroups(privileged=command.privileged)
        directory = self._runtime.directory / secrets.token_hex(16)
        with failing_as(ErrorCode.RUN_FAILED, "make a container's cgroup"):
            cgroup = Cgroup.make(parent, directory.name)
        try:
            with failing_as(ErrorCode.RUN_FAILED, "limit a container's cgroup"):
                limits = self._runtime.processes.limits
                limits.limit_command(cgroup.path)
                limits.open_container(cgroup.path)
            pid = await self._runtime.start(
                command, rootfs, directory, cgroup.path, logged=not is_ours
            )
            binds = {bind.destination: bind for bind in command.binds}
            record = Record(workload, pid, start_ticks(pid), is_ours, command.privileged, binds)
            with failing_as(ErrorCode.RUN_FAILED, f"keep the container {directory.name}"):
                record.write(directory)
                cgroup.keep()
                return record.container(directory, cgroup)
        except BaseException:
            await kill_all(cgroup)
            await cgroup.removed()
            await self._runtime.in_thread(self._runtime.forget, directory)
            raise

    async def _bind(self, container: StandingContainer, command: ContainerCommand) -> None:
        """Mount what ``command`` wants and the container lacks, or raise MOUNT_FAILED."""
        for bind in command.binds:
            there = container.binds.get(bind.destination)
            if there == bind:
                continue
            if bind.is_displaced_by(container.binds.values()):
                continue
            if there is not None and not there.gives_way:
                raise AgentError(
                    ErrorCode.MOUNT_FAILED,
                    f"mount {bind.source} at {bind.destination}: the running container has "
                    f"{there.source} there ({'read-only' if there.read_only else 'read-write'})",
                )
            await self._runtime.in_thread(bind_into, container.pid, bind)
            container.binds[bind.destination] = bind
            await self._runtime.in_thread(Record.of(container).write, container.directory)

    def _add(self, container: StandingContainer) -> None:
        self._by_workload.setdefault(container.workload, []).append(container)
        self._runtime.processes.lifetime.start_soon(self._see_off, container)

    async def _end(self, container: StandingContainer) -> None:
        container.cgroup.kill()
        with trio.move_on_after(_DEATH_S):
            await container.ended.wait()

    async def _end_when_idle(self, container: StandingContainer) -> None:
        """Kill a container's own init when it has no other process any more."""
        await container.left()
        await self._runtime.processes.seen_off(container.cgroup.path, but=FIRST)
        container.cgroup.kill()

    async def _see_off(self, container: StandingContainer) -> None:
        """Clean up after a container that has ended."""
        try:
            await container.wait()
            await kill_all(container.cgroup)
            await self._runtime.processes.seen_off(container.cgroup.path)
            await _remove(container.cgroup)
            await self._runtime.in_thread(self._runtime.forget, container.directory)
            siblings = self._by_workload[container.workload]
            siblings.remove(container)
            if not siblings:
                del self._by_workload[container.workload]
            container.ended.set()
            log.info("container %s has ended", container.id)
        finally:
            container.close()

    @asynccontextmanager
    async def _turn(self, workload: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(workload, trio.Lock())
        try:
            async with turn:
                yield
        finally:
            statistics = turn.statistics()
            if not statistics.locked and not statistics.tasks_waiting:
                self._turns.pop(workload, None)


async def _remove(cgroup: Cgroup) -> None:
    try:
        await cgroup.removed()
    except OSError as error:
        log.error("remove %s: %s", cgroup.path, cause_of(error))
