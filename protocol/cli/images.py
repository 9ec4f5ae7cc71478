"""The commands about images and their layers."""

from typing import Annotated, Final

import typer

from protocol import decode_value, requests, responses
from protocol.cli import output
from protocol.cli.arguments import Image, PlatformOption
from protocol.cli.connection import FAILED, CommandFailed, ask, converse, settings_of
from protocol.cli.export import STDOUT, export_layer
from protocol.cli.pull import pull
from protocol.client import AgentClient
from protocol.values import CollectedGarbage, ImageInfo, PullPlan

PULL_PLAN: Final = "pull-plan-v1"

app = typer.Typer()


@app.command(name="pull")
def pull_image(
    context: typer.Context,
    image: Image,
    platform: PlatformOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be fetched.")
    ] = False,
) -> None:
    """Fetch an image into the VM's store."""
    settings = settings_of(context)

    async def conversation(client: AgentClient) -> responses.Ok:
        if dry_run:
            # An agent that does not know it would pull.
            pong = await client.ask(requests.Ping(), responses.Pong)
            if PULL_PLAN not in pong.capabilities:
                raise CommandFailed("this agent cannot say what a pull would fetch", FAILED)
        return await pull(client, image, platform, dry_run=dry_run)

    answer = converse(settings, conversation)
    if settings.json:
        output.print_json(answer)
        return
    if dry_run:
        output.print_plan(decode_value(answer.data, PullPlan))
        return
    info = decode_value(answer.data, ImageInfo)
    print(f"{info.reference} {info.digest}")


@app.command()
def images(context: typer.Context) -> None:
    """List the images in the VM's store."""
    settings = settings_of(context)
    answer = ask(settings, requests.ListImages())
    if settings.json:
        output.print_json(answer)
        return
    output.print_images(decode_value(answer.data, tuple[ImageInfo, ...]))


@app.command()
def query(context: typer.Context, image: Image) -> None:
    """Describe an image of the VM's store."""
    settings = settings_of(context)
    answer = ask(settings, requests.Query(image))
    if settings.json:
        output.print_json(answer)
        return
    output.print_image(decode_value(answer.data, ImageInfo))


@app.command()
def gc(
    context: typer.Context,
    purge: Annotated[bool, typer.Option("--purge", help="Forget all images first.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
) -> None:
    """Remove what no image and no overlay needs any more."""
    settings = settings_of(context)
    answer = ask(settings, requests.GarbageCollect(dry_run=dry_run, purge_all=purge))
    if settings.json:
        output.print_json(answer)
        return
    output.print_garbage(decode_value(answer.data, CollectedGarbage))


@app.command(name="export-layer")
def export_one_layer(
    context: typer.Context,
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE", help="Its digest, the digest's start, or a reference."),
    ],
    index: Annotated[int, typer.Argument(metavar="INDEX", min=0, help="0 is the bottom layer.")],
    target: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Where to; - is stdout.")
    ] = STDOUT,
) -> None:
    """Write the uncompressed tar of a layer."""
    converse(settings_of(context), lambda client: export_layer(client, image, index, target))


@app.command(name="flatten-layers")
def flatten_layers(
    context: typer.Context,
    lowerdirs: Annotated[
        list[str],
        typer.Argument(metavar="LOWERDIR...", help="Directories of the VM, the topmost first."),
    ],
    target: Annotated[
        str,
        typer.Option("-o", "--output", metavar="DIR", help="A new directory of the VM."),
    ],
) -> None:
    """Merge layers in the VM into one directory, as overlayfs shows them."""
    settings = settings_of(context)
    answer = ask(settings, requests.FlattenLayers(tuple(lowerdirs), target))
    if settings.json:
        output.print_json(answer)
