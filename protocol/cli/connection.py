"""One conversation with the agent a command line is about, and what to say when it fails."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import attrs
import trio
import typer

from protocol import requests, responses
from protocol.address import InvalidAddress
from protocol.client import AgentClient, AgentRefused, ConnectionFailed, connect
from protocol.errors import ProtocolError

Result = TypeVar("Result")

_CONNECT_TIMEOUT_S: Final = 10

_USAGE: Final = 2

FAILED: Final = 1
"""The exit code where nothing else says more."""

AGENT_ERRORS: Final = (AgentRefused, ConnectionFailed, ProtocolError)
"""What a conversation may end in."""


class CommandFailed(Exception):
    """The command ends with this line on stderr and this exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def first_failure() -> Iterator[None]:
    """Let the first exception of a group pass alone: the one that ended a conversation, which
    callers know how to report."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__


@attrs.frozen
class Settings:
    """What was given before the command."""

    address: str | None
    json: bool


def settings_of(context: typer.Context) -> Settings:
    """The settings that the application's callback left for its commands."""
    settings = context.obj
    assert isinstance(settings, Settings)
    return settings


def address_of(settings: Settings) -> str:
    """Where the agent is; raises CommandFailed where nobody has said so."""
    if not settings.address:
        raise CommandFailed(
            "no agent given: use --connect ADDRESS or set INNKEEP_CONNECT "
            "(unix:PATH, vsock:CID:PORT or mux:PATH:PORT)",
            _USAGE,
        )
    return settings.address


def converse(
    settings: Settings, conversation: Callable[[AgentClient], Awaitable[Result]]
) -> Result:
    """Connect, have the conversation, hang up.

    Raises one of AGENT_ERRORS, or CommandFailed without an address to connect to.
    """
    address = address_of(settings)

    async def whole() -> Result:
        try:
            with trio.fail_after(_CONNECT_TIMEOUT_S):
                client = await connect(address)
        except trio.TooSlowError:
            cause = f"no answer within {_CONNECT_TIMEOUT_S} s"
            raise ConnectionFailed(f"cannot connect to {address}: {cause}") from None
        except InvalidAddress as error:
            raise CommandFailed(str(error), _USAGE) from error
        async with client:
            return await conversation(client)

    return run_interruptibly(whole)


def run_interruptibly(whole: Callable[[], Awaitable[Result]]) -> Result:
    """Run ``whole`` on trio; ^C raises KeyboardInterrupt where it waits.

    Anywhere else it could come between two instructions of a library, which then complains.
    """
    return trio.run(whole, restrict_keyboard_interrupt_to_checkpoints=True)


def ask(settings: Settings, request: requests.AgentRequest) -> responses.Ok:
    """A conversation of one request."""
    return converse(settings, lambda client: client.ask(request, responses.Ok))
