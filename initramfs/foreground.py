"""A started machine, watched from the foreground: until it is ready, until it ends, or until ^C."""

import signal
from contextlib import suppress
from functools import partial

import trio
from attrs import frozen

from initramfs.child import Child
from initramfs.console import Console
from initramfs.errors import BootError
from protocol import requests
from protocol.client import ConnectionFailed, open_client
from protocol.errors import ProtocolError

# As often as hosts look for a booting machine.
_PROBE_INTERVAL_S = 0.02
# The agent answers a shutdown within 4 s, and init powers off at once; emulated, all is slower.
_SHUTDOWN_S = 10
_POWER_OFF_S = 5


@frozen
class Machine:
    """A machine that has been started; `doorbell` gets a connection once its agent is ready."""

    child: Child
    address: str
    doorbell: trio.SocketListener | None = None


async def attend(machine: Machine, console: Console, patience_s: float) -> None:
    """Print `ready ADDRESS` once the agent has answered, and return when the machine has ended.

    A signal to end us ends the machine, in order where it was ready; a second one does so at once.

    Raises:
        BootError: it was not ready in time, or ended by itself and not by powering off; with the
            console's last lines.
    """
    failure = None
    told, told_again = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(console.follow, machine.child.output)
        nursery.start_soon(_cancel_at_signals, told, told_again)
        try:
            with told:
                await machine.child.outlive(partial(_first_answer, machine), patience_s)
                print(f"ready {machine.address}", flush=True)
                await machine.child.wait()
                if not await console.ends_well():
                    failure = "the machine died"
            if told.cancelled_caught:
                with told_again:
                    await _power_off(machine)
        except BootError as error:
            failure = str(error)
        machine.child.kill()
        await console.ended.wait()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise BootError(f"{failure}; the last lines of its console:\n{console.last_lines()}")


async def _first_answer(machine: Machine) -> None:
    if machine.doorbell is not None:
        await (await machine.doorbell.accept()).aclose()
    while True:
        with suppress(ConnectionFailed, ProtocolError):
            async with open_client(machine.address) as client:
                await client.request(requests.Ping())
                return
        await trio.sleep(_PROBE_INTERVAL_S)


async def _power_off(machine: Machine) -> None:
    with trio.move_on_after(_SHUTDOWN_S), suppress(ConnectionFailed, ProtocolError):
        async with open_client(machine.address) as client:
            await client.request(requests.Shutdown())
    with trio.move_on_after(_POWER_OFF_S):
        await machine.child.wait()


async def _cancel_at_signals(*scopes: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        for scope in scopes:
            await anext(signals)
            scope.cancel()
        # One signal more changes nothing, but must not end us before the machine has.
        await trio.sleep_forever()
