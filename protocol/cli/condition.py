"""The commands that say how the VM is, and what it uses."""

from collections.abc import Iterable
from typing import Annotated, Final

import trio
import typer
from rich.console import Group, RenderableType
from rich.live import Live

from protocol import decode_value, requests, responses
from protocol.cli import output
from protocol.cli.connection import ask, converse, settings_of
from protocol.cli.diagnosis import print_diagnosis
from protocol.cli.use import summary, use_table
from protocol.client import AgentClient
from protocol.machine import Diagnosis, VmStats

# As docker stats: what a processor did in between is told in percent.
_INTERVAL_S: Final = 1.0

app = typer.Typer()


@app.command()
def diagnose(context: typer.Context) -> None:
    """Say how the VM is: versions, disk, network, limits, and what went wrong last."""
    settings = settings_of(context)
    answer = ask(settings, requests.Diagnose())
    if settings.json:
        output.print_json(answer)
    else:
        print_diagnosis(decode_value(answer.data, Diagnosis))


@app.command()
def stats(
    context: typer.Context,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Show it once, and not every second.")
    ] = False,
) -> None:
    """Show what the VM, its containers and its background commands use, until ^C."""
    settings = settings_of(context)

    async def conversation(client: AgentClient) -> None:
        if settings.json:
            await _print_answers(client, once=no_stream)
        elif no_stream:
            before = await _measured(client)
            await trio.sleep(_INTERVAL_S)
            _print(before, await _measured(client))
        else:
            await _watch(client)

    converse(settings, conversation)


async def _measured(client: AgentClient) -> VmStats:
    answer = await client.ask(requests.VmStats(), responses.Ok)
    return decode_value(answer.data, VmStats)


async def _print_answers(client: AgentClient, *, once: bool) -> None:
    """As they come, one a line: shares are the reader's to reckon."""
    while True:
        output.print_json(await client.ask(requests.VmStats(), responses.Ok), flush=True)
        if once:
            return
        await trio.sleep(_INTERVAL_S)


async def _watch(client: AgentClient) -> None:
    console = output.console()
    before = await _measured(client)
    if not console.is_terminal:
        while True:
            await trio.sleep(_INTERVAL_S)
            after = await _measured(client)
            _print(before, after)
            before = after
    # Lines that the terminal has no room for are left out, with an ellipsis.
    with Live(console=console, auto_refresh=False) as live:
        while True:
            await trio.sleep(_INTERVAL_S)
            after = await _measured(client)
            live.update(Group(*_shown(before, after)), refresh=True)
            before = after


def _print(before: VmStats, after: VmStats) -> None:
    console = output.console()
    for part in _shown(before, after):
        console.print(part)
    console.file.flush()


def _shown(before: VmStats, after: VmStats) -> Iterable[RenderableType]:
    yield from summary(before, after)
    yield use_table(before, after)
