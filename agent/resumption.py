"""What is set right when the VM goes on after a pause, or as a copy of another one.

A host says so with ``resumed``; what the kernel tells of it is noticed without being told, and the
log has what was done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import trio

from agent.config import AgentConfig
from agent.gate import Gate
from agent.linux.namespaces import in_initial_pid_namespace
from agent.machine import answering
from agent.machine.clock import HostClock
from agent.machine.pauses import Pauses
from agent.machine.randomness import Randomness
from agent.machine.signs import ClockJumps, Generations
from agent.uptime import uptime_s
from protocol.values import ClockStep, MountCheck, NetworkCheck, Reseeding, Resumption

log = logging.getLogger(__name__)

_NOT_OURS = "the kernel is not this VM's own: left alone"
_RESEED_LIMIT_S = 5.0
# Of the VM's own time, which stands while it does.
_LOOK_EVERY_S = 1.0

_Step = Callable[[HostClock], ClockStep]


@attrs.frozen
class Kernel:
    """What of the kernel is ours to set; there is none of these where it is not ours."""

    clock: HostClock
    randomness: Randomness
    pauses: Pauses = attrs.field(factory=Pauses)

    @classmethod
    def of(cls, config: AgentConfig) -> Kernel | None:
        """The one that the agent runs on, if nobody else's processes do."""
        # Twice, since no other mistake could do as much harm: containers have numbers of their own.
        if not (config.owns_kernel and in_initial_pid_namespace()):
            return None
        # The image's files have the time that it was made.
        return cls(HostClock(not_before_ns=Path(__file__).stat().st_mtime_ns), Randomness())


@attrs.define(eq=False)
class Resumer:
    """Takes the steps, one resumption after the other.

    ``storage_problem`` says why the storage is not there, if it is not; ``network`` is open when
    it has been brought up, and ``renew_network`` does so again.
    """

    storage: Path
    storage_problem: Callable[[], Awaitable[str | None]]
    network: Gate[None]
    renew_network: Callable[[], Awaitable[None]]
    kernel: Kernel | None
    _jumps: ClockJumps | None = None
    _looked_s: float = -math.inf
    _caught_up: list[ClockStep] = attrs.field(factory=list)
    _after_pause: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    _one_at_a_time: trio.Lock = attrs.field(factory=trio.Lock)

    async def resume(self, time_ns: int | None, entropy: bytes | None) -> Resumption:
        """All steps, at a host's request. Each is taken whatever becomes of the others."""
        follow = partial(HostClock.follow_host, told_ns=time_ns)
        return await self._resume(partial(self._set_clock, follow), entropy)

    def look_for_pause(self) -> None:
        """Set the clock right if the VM has stood still, before a host's request is carried out;
        ``notice`` takes the other steps. Does nothing when it has been called a moment ago.

        There is no event to wait for: while the VM stands nothing in it goes on, and afterwards
        everything as if nothing had been. A request is the first that can come of the world's time.
        """
        now_s = uptime_s()
        if self.kernel is None or now_s < self._looked_s + _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        missed_s = self.kernel.pauses.missed_s()
        if missed_s:
            log.info("the VM stood still for %.0f s", missed_s)
            catch_up = partial(HostClock.catch_up, missed_ns=int(missed_s * 1e9))
            self._caught_up.append(self._set_clock(catch_up))
            self._after_pause.unpark_all()

    async def notice(self, generations: Generations, jumps: ClockJumps) -> None:
        """Take the same steps whenever the kernel tells of an event; does not return."""
        self._jumps = jumps
        # For the first request after a pause to be compared with.
        self.look_for_pause()

        async def whenever(event: Callable[[], Awaitable[None]], what: str, step: _Step) -> None:
            while True:
                await event()
                done = await self._resume(partial(self._set_clock, step), None)
                log.info("%s: %s", what, summary(done))

        async def after_pauses() -> None:
            while True:
                while not self._caught_up:
                    await self._after_pause.park()
                done = await self._resume(self._caught_up.pop, None)
                log.info("after the pause: %s", summary(done))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(after_pauses)
            copied = "the VM has a new generation id"
            nursery.start_soon(whenever, generations.next, copied, HostClock.follow_host)
            # Whoever has set it, NTP perhaps, knew better than an RTC does.
            nursery.start_soon(whenever, jumps.next, "the clock was set", HostClock.follow_ptp)

    async def _resume(
        self, set_clock: Callable[[], ClockStep], entropy: bytes | None
    ) -> Resumption:
        async with self._one_at_a_time:
            clock = set_clock()
            randomness = await self._renew_randomness(entropy)
            checked = await self._check_mounts()
            network = await self._renew_network()
        parts = (clock, randomness, checked, network)
        return Resumption(
            ok=all(part.ok for part in parts),
            clock=clock,
            randomness=randomness,
            mounts=checked,
            network=network,
        )

    def _set_clock(self, step: _Step) -> ClockStep:
        if self.kernel is None:
            return ClockStep(ok=False, source=None, step_ns=0, error=_NOT_OURS)
        done = step(self.kernel.clock)
        if self._jumps is not None:
            self._jumps.forget()
        if done.source is not None:
            # Whatever the VM has missed up to now is made up for.
            self.kernel.pauses.missed_s()
        return done

    async def _renew_randomness(self, entropy: bytes | None) -> Reseeding:
        if self.kernel is None:
            return Reseeding(ok=False, source=None, credited_bytes=0, error=_NOT_OURS)
        renew = partial(self.kernel.randomness.renew, entropy)
        with trio.move_on_after(_RESEED_LIMIT_S):
            return await trio.to_thread.run_sync(renew, abandon_on_cancel=True)
        problem = f"the host's virtio-rng gave nothing within {_RESEED_LIMIT_S:.0f} s"
        return Reseeding(ok=False, source=None, credited_bytes=0, error=problem)

    async def _check_mounts(self) -> MountCheck:
        problem = await self.storage_problem()
        if problem is not None:
            return MountCheck(ok=False, checked=(), error=f"{self.storage}: {problem}")
        shared = answering.shares(answering.MOUNTINFO.read_text(errors="replace").splitlines())
        return await answering.check(self.storage, shared)

    async def _renew_network(self) -> NetworkCheck:
        """As at boot: what is there is left as it is, and what is not comes back."""
        await self.network.decided()
        await self.renew_network()
        failure = self.network.failure
        return NetworkCheck(ok=failure is None, error=failure.message if failure else None)


def summary(done: Resumption) -> str:
    """One line of it for the log."""
    by = f" by {done.clock.source}" if done.clock.source else ""
    said = [
        f"clock stepped by {done.clock.step_ns / 1e9:.3f} s{by}",
        f"{done.randomness.credited_bytes} bytes for the random numbers",
    ]
    errors = {
        "clock": done.clock.error,
        "randomness": done.randomness.error,
        "mounts": done.mounts.error,
        "network": done.network.error,
    }
    said += [f"{part}: {error}" for part, error in errors.items() if error]
    return ", ".join(said)


def set_clock_at_boot(clock: HostClock, launched_ns: int | None) -> None:
    """Step the clock as ``HostClock.set_at_boot`` has it, and log it."""
    done = clock.set_at_boot(launched_ns, uptime_s())
    if done.step_ns:
        log.info("clock stepped by %.3f s by %s", done.step_ns / 1e9, done.source)
    if done.error:
        log.error("clock: %s", done.error)
