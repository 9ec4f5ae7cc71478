"""A person at a terminal, `innkeep run -it` and `innkeep exec -it`, and a shell in the machine."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from protocol.client import AgentClient
from tests.protocol.sessions import pattern, run_innkeep
from tests.protocol.terminal import Terminal, on_terminal
from tests.support.editor import edit
from tests.support.execution import lifeline, pull
from tests.support.images import Images
from tests.support.machine import Machine

PROMPT = "ready> "


@pytest.fixture
async def busybox(client: AgentClient, images: Images) -> str:
    """The reference of an image in the machine's store."""
    await pull(client, images.busybox.reference)
    return images.busybox.reference


@pytest.fixture(params=["exec", "run"])
def where(request: pytest.FixtureRequest, busybox: str) -> list[str]:
    """The command line up to the command: in the machine itself, and in a container."""
    return ["exec", "-it"] if request.param == "exec" else ["run", "-it", busybox]


@asynccontextmanager
async def shell_in(machine: Machine, where: list[str]) -> AsyncIterator[Terminal]:
    """A terminal in front of a shell that has shown its prompt."""
    command = [*where[:1], "-e", f"PS1={PROMPT}", *where[1:], "sh"]
    async with on_terminal(machine.address, *command) as terminal:
        await terminal.see(PROMPT)
        yield terminal


async def leave(terminal: Terminal, status: int) -> None:
    """End a shell whose last command had this status; nothing of it is left on our terminal."""
    await terminal.see(PROMPT)
    await terminal.type("\x04")
    assert await terminal.exit_code() == status
    assert not terminal.is_raw


async def test_commands_are_typed_and_edited_and_the_end_key_leaves(
    machine: Machine, where: list[str]
) -> None:
    async with shell_in(machine, where) as terminal:
        assert terminal.is_raw
        await terminal.type("echo wrong\x15echo a$((1 + 1))b; tty; (exit 42)\r")
        assert b"/dev/" in await terminal.see(r"a2b\r\n/dev/\S+\r\n")
        await leave(terminal, 42)


async def test_the_command_sees_the_size_and_each_change_of_it(
    machine: Machine, where: list[str]
) -> None:
    async with shell_in(machine, where) as terminal:
        await terminal.type("stty size\r")
        await terminal.see(r"24 80\r\n")
        await terminal.see(PROMPT)
        script = 'trap "kill $!; exit 0" WINCH; sleep 1000 & echo up$((1)); wait'
        await terminal.type(f"sh -c '{script}'; stty size\r")
        await terminal.see("up1")
        terminal.resize(132, 50)
        await terminal.see(r"50 132\r\n")
        await leave(terminal, 0)


async def test_the_interrupt_key_ends_the_command_and_not_the_shell(
    machine: Machine, where: list[str]
) -> None:
    async with shell_in(machine, where) as terminal:
        await terminal.type("sh -c 'echo up$((1)); exec sleep 1000'\r")
        await terminal.see("up1")
        await terminal.type("\x03")
        await terminal.see(PROMPT)
        await terminal.type("echo status $?\r")
        await terminal.see("status 130")
        await leave(terminal, 0)


async def test_a_command_is_stopped_and_brought_back(machine: Machine, where: list[str]) -> None:
    async with shell_in(machine, where) as terminal:
        await terminal.type("echo up$((1)); cat\r")
        await terminal.see("up1")
        await terminal.type("one\r")
        # Once by the terminal there, once by cat.
        await terminal.see("one\r\none\r\n")
        await terminal.type("\x1a")
        await terminal.see("Stopped")
        await terminal.see(PROMPT)
        await terminal.type("fg\r")
        await terminal.see("\ncat\r\n")
        await terminal.type("two\r")
        await terminal.see("two\r\ntwo\r\n")
        await terminal.type("\x04")
        await leave(terminal, 0)


async def test_an_editor_draws_its_screen(machine: Machine, where: list[str]) -> None:
    async with shell_in(machine, where) as terminal:
        await edit(terminal)
        await terminal.type(":w\r")
        await terminal.see("3L")
        await terminal.type("dd:q!\r")
        await terminal.see(PROMPT)
        await terminal.type("cat /tmp/file; rm /tmp/file\r")
        await terminal.see("first\r\nin between\r\nsecond\r\n")
        await leave(terminal, 0)


async def test_a_terminal_that_goes_away_takes_the_commands_with_it(machine: Machine) -> None:
    async with (
        lifeline(machine.address) as line,
        on_terminal(machine.address, "exec", "-it", "sh", "-c", line.script("cat")) as terminal,
    ):
        await line.started()
        terminal.hang_up()
        await line.ended()


@pytest.mark.parametrize("kind", ["exec", "run"])
async def test_in_a_pipeline_it_is_a_command_like_any_other(
    machine: Machine, busybox: str, kind: str
) -> None:
    data = pattern(5 << 20)
    command = ["exec", "-i"] if kind == "exec" else ["run", "-i", busybox]
    script = "sha256sum; echo of input >&2; exit 3"
    result = await run_innkeep(machine.address, *command, "sh", "-c", script, stdin=data)
    assert (result.returncode, result.stderr) == (3, b"of input\n")
    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()

    result = await run_innkeep(machine.address, *command, "cat", stdin=data)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == data
