"""The VM's one workload: started at boot or by a host, restarted, stopped, taken over."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import attrs
import trio

from agent.errors import AgentError, cause_of, failing_as
from agent.processes.process import Process, Stdio, Stream
from agent.workload.commands import Commands, Running
from agent.workload.end import STOPPED, End
from agent.workload.keeper import Keeper, ended, start_ticks
from agent.workload.log import WorkloadLog
from agent.workload.log_part import Counts
from agent.workload.place import Group, Place, Started, Words
from agent.workload.record import Record, RunRecord
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)

# As docker's restart policies have it: doubled each time, from the first again after a while.
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 60.0
_LASTING_S = 10.0


class Busy(Exception):
    """There is a workload, or none may be started; the text says which."""


@attrs.define(eq=False)
class Run:
    """The workload from one start to one end."""

    is_boots: bool
    running: Running
    decided: trio.Event = attrs.field(factory=trio.Event)
    """It runs, or it never will: then ``over`` is set as well."""
    over: trio.Event = attrs.field(factory=trio.Event)
    end: End | None = None
    refusal: AgentError | None = None
    """Why it was never started."""
    written: Counts = attrs.field(factory=dict)
    """How far the log was at its end."""

    @property
    def result(self) -> End:
        """How it ended, once it is over."""
        assert self.end is not None
        return self.end


@attrs.define(eq=False)
class Supervisor:
    """Made by whoever opens the workload; ``supervise`` runs as long as the agent does."""

    place: Place
    log: WorkloadLog
    commands: Commands
    directory: Path
    """For what the next agent has to know."""
    may_start: Callable[[], bool]
    """Whether the agent takes new work at all."""
    words: Words | None = None
    """What is started at boot."""
    restart: str = "never"
    current: Run | None = None
    boots_end: End | None = None
    """How the workload of the boot ended last; None while it runs, or where there is none."""
    on_boots_end: list[Callable[[End], None]] = attrs.field(factory=list)
    """Called whenever it has ended."""
    _nursery: trio.Nursery | None = None
    _is_restarting: bool = False
    """Whether the boot's workload has ended to be started again."""
    _pause: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Before that."""
    _known: RunRecord | None = None

    @property
    def _keepers(self) -> Path:
        return self.directory / "runs"

    async def supervise(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take over what an earlier agent left, and see to the boot's workload, until cancelled.

        What runs then goes on.
        """
        record = await trio.to_thread.run_sync(self._found_record)
        self._known, self.boots_end = record.run, record.boots_end
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            known = self._known
            if known is not None:
                if known.is_boots:
                    self.boots_end = None
                self.current, held = self._entered(is_boots=known.is_boots)
                nursery.start_soon(self._take_over, self.current, held, known)
                if known.stop_until is not None:
                    left_s = max(0.0, known.stop_until - _boottime())
                    nursery.start_soon(self.commands.stop, left_s)
            if self.words is not None:
                nursery.start_soon(self._keep_running, self.words)
            task_status.started()
            await trio.sleep_forever()

    def begin(self, words: Words) -> Run:
        """Start the workload, for a host; it goes on whether that stays or not.

        Raises:
            Busy: there is one already, or none may be started now.
        """
        if self.current is not None or self._is_restarting:
            raise Busy("the workload runs already: there is one at a time")
        return self._begin(words, is_boots=False)

    def stop(self, timeout_s: float) -> None:
        """End the workload for good and all other commands: TERM, and KILL after the time."""
        if self._is_restarting and self.boots_end is not None:
            self._is_restarting = False
            self._pause.cancel()
            self.boots_end = End(self.boots_end.code, STOPPED)
        if self._known is not None:
            until, earlier = _boottime() + timeout_s, self._known.stop_until
            until = until if earlier is None else min(until, earlier)
            self._known = attrs.evolve(self._known, stop_until=until)
        self._keep_record()
        assert self._nursery is not None
        self._nursery.start_soon(self.commands.stop, timeout_s)

    def _begin(self, words: Words, *, is_boots: bool) -> Run:
        if self.commands.is_stopping or not self.may_start():
            raise Busy("everything is being stopped")
        assert self._nursery is not None
        if is_boots:
            self.boots_end, self._is_restarting = None, False
        run, held = self._entered(is_boots=is_boots)
        self.current = run
        self._nursery.start_soon(self._see_through, run, held, words)
        return run

    def _entered(self, *, is_boots: bool) -> tuple[Run, ExitStack]:
        """A run that signals and stops reach from now on, until the other is closed."""
        with ExitStack() as held:
            return Run(is_boots, held.enter_context(self.commands.entered())), held.pop_all()

    async def _keep_running(self, words: Words) -> None:
        """Start the boot's workload, and again as its policy has it."""
        if self.current is not None:
            # An earlier run of this one, or a host's that has its place.
            await self.current.over.wait()
        delay_s = _FIRST_DELAY_S
        if self.boots_end is not None:
            self._is_restarting = self._is_to_restart(self.boots_end)
        while self.boots_end is None or await self._is_time_to_restart(delay_s):
            begun_at = trio.current_time()
            try:
                run = self._begin(words, is_boots=True)
            except Busy:
                return
            await run.over.wait()
            lasted = trio.current_time() - begun_at >= _LASTING_S
            delay_s = _FIRST_DELAY_S if lasted else min(2 * delay_s, _LONGEST_DELAY_S)

    def _is_to_restart(self, end: End) -> bool:
        if self.words is None or end.reason == STOPPED:
            return False
        return self.restart == "always" or (self.restart == "on-failure" and end.code != 0)

    async def _is_time_to_restart(self, delay_s: float) -> bool:
        """After the delay; False if there is to be no restart, or nobody wants it any more."""
        if self._is_restarting:
            with trio.CancelScope() as self._pause:
                await trio.sleep(delay_s)
        return self._is_restarting

    async def _see_through(self, run: Run, held: ExitStack, words: Words) -> None:
        with held:
            keeper = None
            try:
                await self.place.ready()
                with failing_as(ErrorCode.SPAWN_FAILED, f"keep {self._keepers}"):
                    keeper = await trio.to_thread.run_sync(Keeper.new, self._keepers)
                started = await self._started(run, words, keeper)
            except AgentError as error:
                log.warning("the workload cannot be started: %s", error.message)
                run.refusal = error
                self._end(run, End.unstarted(error.message), keeper)
                return
            process = started.process
            if self._known is not None:
                self._known = attrs.evolve(self._known, leader=started.group.leader)
                self._keep_record()
            run.running.started(started.group)
            run.decided.set()
            try:
                await process.wait()
                outcome = process.outcome()
            finally:
                process.close()
            end = End.of(outcome, stopped=run.running.stopped, is_child=False)
            self._end(run, end, keeper)

    async def _started(self, run: Run, words: Words, keeper: Keeper) -> Started:
        stdio = Stdio(
            takes_stdin=True,
            log=self.log.fifo(Stream.STDOUT),
            error_log=self.log.fifo(Stream.STDERR),
        )

        def record(process: Process) -> None:
            self._known = RunRecord(
                is_boots=run.is_boots,
                keeper=keeper.directory.name,
                pid=process.pid,
                # Where it is over already nobody will wait for it.
                ticks=start_ticks(process.pid) or 0,
                cgroup_path=None if process.cgroup is None else str(process.cgroup.path),
                in_container=self.place.in_container,
            )
            self._keep_record()

        return await self.place.start_kept(words, stdio, keeper, record)

    async def _take_over(self, run: Run, held: ExitStack, known: RunRecord) -> None:
        """See to the end of what an earlier agent has started, or was about to start."""
        with held:
            running, cgroup = run.running, known.cgroup
            keeper = Keeper(self._keepers / known.keeper)
            running.stopped = known.stop_until is not None
            leader = known.leader
            if leader is None:
                with suppress(OSError):
                    leader = await keeper.find_pid(
                        known.pid, known.ticks, cgroup, in_container=known.in_container
                    )
            if leader is not None:
                if self._known is not None:
                    self._known = attrs.evolve(self._known, leader=leader)
                    self._keep_record()
                if cgroup is not None:
                    with suppress(OSError):  # it has ended
                        cgroup.tell_pid(leader)
                running.started(Group(leader, cgroup, known.in_container))
            run.decided.set()
            await ended(known.pid, known.ticks)
            if not keeper.has_begun() and not running.stopped:
                # That agent died before it let it: nothing has happened yet.
                self._over(run, keeper)
                return
            oom = cgroup is not None and bool(cgroup.counters().oom_kills)
            end = End.kept(keeper.kept_code(), oom=oom, stopped=running.stopped)
            self._end(run, end, keeper)

    def _end(self, run: Run, end: End, keeper: Keeper | None) -> None:
        self.log.drain()
        run.written = self.log.written
        run.end = end
        log.info("the workload has ended with %d: %s", end.code, end.reason)
        if run.is_boots:
            self.boots_end = end
            self._is_restarting = self._is_to_restart(end)
        self._over(run, keeper)
        if run.is_boots:
            for tell in list(self.on_boots_end):
                tell(end)

    def _over(self, run: Run, keeper: Keeper | None) -> None:
        self.current = self._known = None
        self._keep_record()
        if keeper is not None:
            keeper.remove()
        run.decided.set()
        run.over.set()

    def _keep_record(self) -> None:
        try:
            Record(run=self._known, boots_end=self.boots_end).write(self.directory)
        except OSError as error:
            # It goes on; only another agent would not know.
            log.error("keep what is known of the workload: %s", cause_of(error))

    def _found_record(self) -> Record:
        """An earlier agent's; what is kept of other runs is removed. Blocks."""
        record = Record.read(self.directory)
        known = None if record.run is None else record.run.keeper
        if self._keepers.is_dir():
            for directory in self._keepers.iterdir():
                if directory.name != known:
                    shutil.rmtree(directory, ignore_errors=True)
        return record


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
