"""``innkeep workload``: the VM's workload, its commands and its log."""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from signal import Signals
from typing import Annotated, Final, TypeVar

import attrs
import trio
import typer

from protocol import Port, workload
from protocol.address import InvalidAddress
from protocol.cli import execution
from protocol.cli.arguments import CommandAfterOptions
from protocol.cli.attach import write
from protocol.cli.connection import (
    CommandFailed,
    Settings,
    address_of,
    run_interruptibly,
    settings_of,
)
from protocol.client import (
    AuthenticationFailed,
    ConnectionFailed,
    WorkloadClient,
    open_workload_client,
)
from protocol.errors import ProtocolError
from protocol.values import U64_MAX

Result = TypeVar("Result")

_AGENT_FAILED: Final = 125
_USAGE: Final = 2
# Ours on each connection, which has one request only.
_OURS: Final = 1
_WORKLOADS: Final = 0
# No request of ours has it; the error that a signal to it brings comes when all before it is done.
_NOBODYS: Final = U64_MAX
_AUTHENTICATE_WITHIN_S: Final = 10

app = typer.Typer(
    name="workload",
    help="The VM's one workload, commands beside it, and its log.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Command = Annotated[
    list[str], typer.Argument(metavar="COMMAND", help="The command and its arguments.")
]


@attrs.frozen
class _Token:
    """The settings before ``workload``, and the file that has the token."""

    settings: Settings
    file: Path | None


@app.callback()
def options(
    context: typer.Context,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            envvar="INNKEEP_TOKEN_FILE",
            help="The file with the token that the VM was given.",
        ),
    ] = None,
) -> None:
    """The VM's one workload, commands beside it, and its log."""
    context.obj = _Token(settings_of(context), token_file)


@app.command(cls=CommandAfterOptions)
def run(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND", help="The command; without one, the image's own."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("-e", "--env", metavar="NAME[=VALUE]", help="Set a variable."),
    ] = None,
    workdir: Annotated[
        str | None, typer.Option("-w", "--workdir", metavar="DIR", help="Run in this directory.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Leave it running once it has started.")
    ] = False,
) -> int:
    """Start the workload; exits with its exit code. It goes on when we are interrupted."""
    variables = execution.environment(env or ())
    message = workload.Run(_OURS, tuple(command or ()), variables, workdir)

    async def conversation(client: WorkloadClient) -> int:
        await client.send(message)
        return await _followed(client, only_start=detach)

    return _converse(context, conversation)


@app.command(name="exec", cls=CommandAfterOptions)
def exec_command(
    context: typer.Context,
    command: Command,
    tty: Annotated[bool, typer.Option("-t", "--tty", help="Give it a terminal.")] = False,
) -> int:
    """Run a command beside the workload, without input; exits with its exit code."""

    async def conversation(client: WorkloadClient) -> int:
        await client.send(workload.Exec(_OURS, tuple(command), tty))
        return await _followed(client, only_start=False)

    return _converse(context, conversation)


@app.command()
def signal(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="SIGNAL", help="A name or a number.")] = "TERM",
) -> int:
    """Send a signal to the workload."""
    number = _signal_number(name)

    async def conversation(client: WorkloadClient) -> int:
        await client.send(workload.Signal(_WORKLOADS, number))
        await _done(client)
        return 0

    return _converse(context, conversation)


@app.command()
def stop(
    context: typer.Context,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="Kill it after this time.")
    ] = 10,
) -> int:
    """Have the workload and all commands beside it end: TERM, and KILL later."""
    timeout_ms = execution.milliseconds(timeout)
    assert timeout_ms is not None

    async def conversation(client: WorkloadClient) -> int:
        await client.send(workload.Stop(timeout_ms))
        await _done(client)
        return 0

    return _converse(context, conversation)


@app.command()
def logs(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what is written from now on.")
    ] = False,
) -> int:
    """Print what the workload has written, as far as it is kept."""

    async def conversation(client: WorkloadClient) -> int:
        try:
            while True:
                await _print(await client.receive())
        except ConnectionFailed:
            if follow:
                raise
            return 0

    return _converse(context, conversation, Port.WORKLOAD_LOGS, follow=follow)


async def _followed(client: WorkloadClient, *, only_start: bool) -> int:
    """Pass on what our request's command writes, to its end; the exit code to end with."""
    lost = False
    while True:
        message = await client.receive()
        match message:
            case workload.Started(request_id=1) if only_start:
                return 0
            case workload.Stdout(request_id=1) | workload.Stderr(request_id=1):
                lost = lost or message.truncated
                await _print(message)
            case workload.Exit(1, code, reason):
                if lost:
                    _say("some of the output was lost: it was not read fast enough")
                if reason != "exited" and not reason.startswith("signaled"):
                    _say(reason)
                return code
            case workload.Error(request_id=None | 1):
                raise CommandFailed(message.message, _AGENT_FAILED)


async def _done(client: WorkloadClient) -> None:
    """Wait until what was sent has been dealt with; raises CommandFailed where it was refused."""
    await client.send(workload.Signal(_NOBODYS, Signals.SIGTERM))
    while True:
        message = await client.receive()
        if isinstance(message, workload.Error):
            if message.request_id == _NOBODYS:
                return
            raise CommandFailed(message.message, _AGENT_FAILED)


async def _print(message: object) -> None:
    match message:
        case workload.Stdout(data=data):
            await write(sys.stdout, data)
        case workload.Stderr(data=data):
            await write(sys.stderr, data)
        case workload.Error(message=text):
            raise CommandFailed(text, _AGENT_FAILED)


def _say(text: str) -> None:
    print(f"innkeep: {text}", file=sys.stderr)


def _converse(
    context: typer.Context,
    conversation: Callable[[WorkloadClient], Awaitable[Result]],
    port: Port = Port.WORKLOAD_CONTROL,
    *,
    follow: bool = True,
) -> Result:
    """Connect, show the token, have the conversation, hang up."""
    given = context.obj
    assert isinstance(given, _Token)
    address = address_of(given.settings)
    token = _read_token(given.file)

    async def whole() -> Result:
        with trio.CancelScope(deadline=trio.current_time() + _AUTHENTICATE_WITHIN_S) as patience:
            async with open_workload_client(address, token, port, follow=follow) as client:
                patience.deadline = float("inf")
                return await conversation(client)
        raise ConnectionFailed(f"{address}: no answer within {_AUTHENTICATE_WITHIN_S} s")

    try:
        return run_interruptibly(whole)
    except InvalidAddress as error:
        raise CommandFailed(str(error), _USAGE) from error
    except (AuthenticationFailed, ConnectionFailed, ProtocolError) as error:
        raise CommandFailed(str(error), _AGENT_FAILED) from error


def _read_token(file: Path | None) -> str:
    if file is None:
        raise CommandFailed("no token given: use --token-file FILE or set INNKEEP_TOKEN_FILE", 2)
    try:
        # Not chained: the cause holds the content.
        token = file.read_bytes().strip(b" \t\r\n\0").decode("ascii")
    except OSError as error:
        raise CommandFailed(f"cannot read {file}: {error.strerror}", _USAGE) from None
    except UnicodeDecodeError:
        token = ""
    if not token:
        raise CommandFailed(f"{file} holds no token", _USAGE)
    return token


def _signal_number(name: str) -> int:
    if name.isdecimal():
        return min(int(name), 2**31 - 1)
    upper = name.upper()
    try:
        return Signals[upper if upper.startswith("SIG") else f"SIG{upper}"]
    except KeyError:
        raise CommandFailed(f"no such signal: {name}", _USAGE) from None
