"""What the agent does for a VM whose kernel is its own, as long as it lives."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import trio

from agent.errors import cause_of
from agent.machine.modules import load_later
from agent.machine.power_button import PowerButton
from agent.machine.signs import ClockJumps, Generations
from agent.resumption import set_clock_at_boot
from agent.services import Services

log = logging.getLogger(__name__)


async def look_after(services: Services) -> None:
    """Keep clock and random numbers right, and power off when the button is pressed.

    What cannot be watched is logged, and the rest is.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_notice_changes, services)
        for gate in (services.images, services.network):
            await gate.decided()
        # Not before: what they bring nobody waits for at boot.
        loaded = await trio.to_thread.run_sync(load_later)
        if loaded:
            log.debug("loaded %s", ", ".join(loaded))
            assert services.kernel is not None
            set_clock_at_boot(services.kernel.clock, services.config.host_time_ns)
        await _await_button(services)


async def _notice_changes(services: Services) -> None:
    with ExitStack() as held:
        try:
            generations = held.enter_context(Generations.watched())
            jumps = held.enter_context(ClockJumps.watched())
        except OSError as error:
            log.error("watch for jumps of the clock and copies of the VM: %s", cause_of(error))
            return
        await services.resumer.notice(generations, jumps)


async def _await_button(services: Services) -> None:
    with ExitStack() as held:
        try:
            button = held.enter_context(PowerButton.watched())
        except OSError as error:
            log.error("watch the power button: %s", cause_of(error))
            return
        log.debug("power buttons: %d", len(button))
        await button.pressed()
        log.info("the power button was pressed")
        await services.power_off()
