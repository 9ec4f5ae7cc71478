"""The commands of ``innkeep`` and their options."""

import os
import sys
import time
from typing import Annotated, Final

import trio
import typer
from rich.filesize import decimal

from protocol import decode_value, requests, responses
from protocol.cli import condition, copy, execution, images, output, workload
from protocol.cli.arguments import CommandAfterImage, CommandAfterOptions, Image, PlatformOption
from protocol.cli.connection import (
    AGENT_ERRORS,
    FAILED,
    CommandFailed,
    Settings,
    ask,
    converse,
    settings_of,
)
from protocol.cli.execution import PullPolicy
from protocol.client import AgentClient
from protocol.values import NetworkReport, Resumption, StorageStatus

_INTERRUPTED: Final = 130
_ENTROPY_BYTES: Final = 64

app = typer.Typer(
    name="innkeep",
    help="Talk to the agent inside a microVM.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Without a name: its commands are ours.
app.add_typer(images.app)
app.add_typer(condition.app)
app.add_typer(workload.app)

Command = Annotated[
    list[str], typer.Argument(metavar="COMMAND", help="The command and its arguments.")
]
ImageCommand = Annotated[
    list[str] | None,
    typer.Argument(metavar="COMMAND", help="The command; without one, the image's own."),
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option(
        "-e",
        "--env",
        metavar="NAME[=VALUE]",
        help="Set a variable; without a value, take it from here.",
    ),
]
WorkdirOption = Annotated[
    str | None, typer.Option("-w", "--workdir", metavar="DIR", help="Run in this directory.")
]
UserOption = Annotated[
    str | None,
    typer.Option("-u", "--user", metavar="USER[:GROUP]", help="Run as this user."),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout", metavar="SECONDS", min=0, help="Kill it after this time, exit code 124."
    ),
]

InteractiveOption = Annotated[
    bool, typer.Option("-i", "--interactive", help="Pass our input on to it.")
]
TtyOption = Annotated[bool, typer.Option("-t", "--tty", help="Give it a terminal.")]
BackgroundOption = Annotated[
    bool, typer.Option("--background", help="Leave it running, and print its process id.")
]


@app.callback()
def options(
    context: typer.Context,
    connect: Annotated[
        str | None,
        typer.Option(
            "--connect",
            metavar="ADDRESS",
            envvar="INNKEEP_CONNECT",
            help="The agent: unix:PATH, vsock:CID:PORT or mux:PATH:PORT.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the agent's answers as JSON.")
    ] = False,
) -> None:
    """Talk to the agent inside a microVM."""
    context.obj = Settings(address=connect, json=json)


@app.command()
def ping(context: typer.Context) -> None:
    """Ask whether the agent is there."""
    settings = settings_of(context)

    async def conversation(client: AgentClient) -> tuple[responses.Pong, float]:
        start = trio.current_time()
        pong = await client.ask(requests.Ping(), responses.Pong)
        return pong, trio.current_time() - start

    pong, seconds = converse(settings, conversation)
    if settings.json:
        output.print_json(pong)
        return
    capabilities = "".join(f", {capability}" for capability in pong.capabilities)
    print(f"pong: protocol version {pong.version}, {seconds * 1000:.1f} ms{capabilities}")
    for error in pong.config_errors:
        output.print_error(f"configuration: {error}")


@app.command(name="network-test")
def network_test(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="What to reach, http or https.")],
) -> None:
    """Say how far the VM gets on its way to a URL."""
    settings = settings_of(context)
    answer = ask(settings, requests.NetworkTest(url))
    report = decode_value(answer.data, NetworkReport)
    if settings.json:
        output.print_json(answer)
    else:
        output.print_network_report(report)
    if not report.ok:
        raise typer.Exit(FAILED)


@app.command()
def status(context: typer.Context) -> None:
    """Show the state of the VM's storage."""
    settings = settings_of(context)
    answer = ask(settings, requests.StorageStatus())
    if settings.json:
        output.print_json(answer)
        return
    storage = decode_value(answer.data, StorageStatus)
    output.print_values(
        {
            "ready": "yes" if storage.ready else "no",
            "used": f"{decimal(storage.used_bytes)} of {decimal(storage.total_bytes)}",
            "images": str(storage.image_count),
            "layers": str(storage.layer_count),
            **({"root": f"in memory: {storage.root_error}"} if storage.root_error else {}),
        }
    )


@app.command()
def shutdown(context: typer.Context) -> None:
    """Stop everything in the VM and power it off."""
    settings = settings_of(context)
    answer = ask(settings, requests.Shutdown())
    if settings.json:
        output.print_json(answer)


@app.command()
def resumed(
    context: typer.Context,
    keep_time: Annotated[
        bool, typer.Option("--keep-time", help="Do not tell the VM this machine's time.")
    ] = False,
) -> None:
    """Tell the VM that it goes on after a pause, elsewhere, or as a copy of another one.

    Its clock is set, its random numbers get bytes of ours that no copy of it has, and its mounts
    and network are looked at.
    """
    settings = settings_of(context)

    async def conversation(client: AgentClient) -> responses.Ok:
        told_ns = None if keep_time else time.time_ns()
        request = requests.Resumed(time_ns=told_ns, entropy=os.urandom(_ENTROPY_BYTES))
        return await client.ask(request, responses.Ok)

    answer = converse(settings, conversation)
    done = decode_value(answer.data, Resumption)
    if settings.json:
        output.print_json(answer)
    else:
        output.print_resumption(done)
    if not done.ok:
        raise typer.Exit(FAILED)


@app.command(name="run", cls=CommandAfterImage)
def run_command(
    context: typer.Context,
    image: Image,
    command: ImageCommand = None,
    env: EnvOption = None,
    workdir: WorkdirOption = None,
    user: UserOption = None,
    timeout: TimeoutOption = None,
    interactive: InteractiveOption = False,
    tty: TtyOption = False,
    detach: Annotated[
        bool,
        typer.Option(
            "-d",
            "--detach",
            help="Leave it running as the container's first process; print its id.",
        ),
    ] = False,
    background: BackgroundOption = False,
    overlay: Annotated[
        str | None,
        typer.Option(
            "--overlay",
            metavar="ID",
            help="Keep the root's changes under this name; runs of one name share a container.",
        ),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "-v",
            "--volume",
            metavar="TAG|DIR:PATH[:ro]",
            help="Mount a virtiofs share, or a directory of the VM.",
        ),
    ] = None,
    privileged: Annotated[
        bool, typer.Option("--privileged", help="Lift the limits that containers have.")
    ] = False,
    platform: PlatformOption = None,
    pull: Annotated[PullPolicy, typer.Option("--pull", help="When to pull the image.")] = (
        PullPolicy.MISSING
    ),
) -> int:
    """Run a command in a container of an image; exits with its exit code.

    Options end where the command starts, or at --.
    """
    request = requests.Run(
        image=image,
        command=tuple(command or ()),
        env=execution.environment(env or ()),
        workdir=workdir,
        user=user,
        mounts=execution.mounts(volume or ()),
        timeout_ms=execution.milliseconds(timeout),
        interactive=interactive,
        tty=tty,
        detached=detach,
        persistent_overlay_id=overlay,
        background=background,
        unprivileged=not privileged,
    )
    return execution.run(settings_of(context), request, platform, pull)


@app.command(name="exec", cls=CommandAfterOptions)
def exec_command(
    context: typer.Context,
    command: Command,
    env: EnvOption = None,
    workdir: WorkdirOption = None,
    timeout: TimeoutOption = None,
    interactive: InteractiveOption = False,
    tty: TtyOption = False,
    background: BackgroundOption = False,
) -> int:
    """Run a command in the VM itself, as root; exits with its exit code.

    Options end where the command starts, or at --.
    """
    request = requests.VmExec(
        command=tuple(command),
        env=execution.environment(env or ()),
        workdir=workdir,
        timeout_ms=execution.milliseconds(timeout),
        interactive=interactive,
        tty=tty,
        background=background,
    )
    return execution.execute(settings_of(context), request)


@app.command(name="cp")
def copy_command(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A path here, vm:PATH, or - for standard input.")
    ],
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION", help="vm:PATH, a path here, or - for standard output."
        ),
    ],
    overlay: Annotated[
        str | None,
        typer.Option(
            "--overlay", metavar="ID", help="The VM's paths are those of this persistent overlay."
        ),
    ] = None,
    archive: Annotated[
        bool, typer.Option("-a", "--archive", help="Keep owners, and set-user-ID with them.")
    ] = False,
    follow_link: Annotated[
        bool,
        typer.Option("-L", "--follow-link", help="Copy what a link SOURCE leads to."),
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
) -> None:
    """Copy a file or a directory into the VM, or out of it.

    The rules are those of docker cp. With - it is a tar stream. What was interrupted goes on where
    it was, when the same command is given again.
    """
    options = copy.Options(overlay=overlay, archive=archive, follow_link=follow_link, quiet=quiet)
    copy.copy(settings_of(context), source, destination, options)


def run(arguments: list[str]) -> int:
    """Run a command line; the exit code to end with. Says what failed in one line on stderr."""
    try:
        code = app(arguments, prog_name="innkeep", standalone_mode=False)
        # None where it was closed before we started.
        if sys.stdout is not None:
            sys.stdout.flush()
    except CommandFailed as error:
        output.print_error(str(error))
        return error.exit_code
    except AGENT_ERRORS as error:
        output.print_error(str(error))
        return FAILED
    except typer.TyperException as error:
        output.print_error(f"{error.format_message()} (see innkeep --help)")
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more on its way out, and must not find the pipe. This is
        # for what is still buffered; typer does the same for what the command itself wrote.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code if isinstance(code, int) else 0
