"""A pseudo-terminal of the kernel's, from the agent's side."""

import os
import termios
from collections.abc import AsyncIterator
from contextlib import ExitStack

import attrs
import pytest
import trio

from agent.processes.terminal import DEFAULT_SIZE, Size, Terminal, open_terminal, set_size

PATIENCE_S = 20


@attrs.frozen
class Pair:
    """The agent's terminal, and a descriptor of the command's end."""

    terminal: Terminal
    command: int

    async def show(self) -> bytes:
        """What is to be seen now, at least something."""
        with trio.fail_after(PATIENCE_S):
            return await self.terminal.output.receive()

    async def line(self) -> bytes:
        """What a command reads: a line, or nothing at the end of its input."""
        return await trio.to_thread.run_sync(os.read, self.command, 4096)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    with ExitStack() as ours, ExitStack() as theirs:
        master, path = open_terminal(ours, theirs)
        ours.pop_all()
        terminal = Terminal(master)
        command = os.open(path, os.O_RDWR | os.O_NOCTTY)
        theirs.close()
        yield Pair(terminal, command)
        terminal.close()
        terminal.output.close()
        os.close(command)


def without_echo(pair: Pair) -> None:
    settings = termios.tcgetattr(pair.command)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(pair.command, termios.TCSANOW, settings)


async def test_it_begins_with_80_by_24(pair: Pair) -> None:
    assert Size(80, 24) == DEFAULT_SIZE
    assert termios.tcgetwinsize(pair.command) == (24, 80)


async def test_its_size_can_be_changed_to_any(pair: Pair) -> None:
    for size in (Size(132, 50), Size(0, 0), Size(65535, 65535)):
        pair.terminal.resize(size)
        assert termios.tcgetwinsize(pair.command) == (size.rows, size.columns)
    set_size(pair.command, Size(1, 2))
    assert termios.tcgetwinsize(pair.terminal._descriptor) == (2, 1)
    pair.terminal.close()
    pair.terminal.resize(Size(9, 9))
    assert termios.tcgetwinsize(pair.command) == (2, 1)


async def test_what_is_typed_is_shown_and_read_by_lines(pair: Pair) -> None:
    await pair.terminal.send(b"one\n")
    assert await pair.show() == b"one\r\n"
    assert await pair.line() == b"one\n"
    os.write(pair.command, b"answer\n")
    assert await pair.show() == b"answer\r\n"


async def test_its_end_is_read_as_such_also_behind_half_a_line(pair: Pair) -> None:
    without_echo(pair)
    await pair.terminal.end()
    assert (await pair.line(), await pair.line()) == (b"", b"")
    await pair.terminal.send(b"half")
    await pair.terminal.end()
    assert (await pair.line(), await pair.line()) == (b"half", b"")
    # And it can be used after that, as any terminal.
    await pair.terminal.send(b"more\n")
    assert await pair.line() == b"more\n"


async def test_its_end_is_the_character_that_the_command_has_chosen(pair: Pair) -> None:
    without_echo(pair)
    settings = termios.tcgetattr(pair.command)
    settings[6][termios.VEOF] = b"Z"
    termios.tcsetattr(pair.command, termios.TCSANOW, settings)
    await pair.terminal.send(b"\x04")
    await pair.terminal.end()
    assert (await pair.line(), await pair.line()) == (b"\x04", b"")


async def test_typing_waits_for_who_reads(pair: Pair) -> None:
    settings = termios.tcgetattr(pair.command)
    settings[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(pair.command, termios.TCSANOW, settings)
    data = bytes(range(32, 127)) * 2_000
    read = b""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.terminal.send, data)
            await trio.testing.wait_all_tasks_blocked(0.01)
            while len(read) < len(data):
                read += await pair.line()
    assert read == data


async def test_output_waits_for_who_shows_it(pair: Pair) -> None:
    shown = b""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, os.write, pair.command, b"x" * 200_000)
            while len(shown) < 200_000:
                shown += await pair.show()
    assert shown == b"x" * 200_000


async def test_output_ends_when_no_process_has_it_any_more(pair: Pair) -> None:
    another = os.dup(pair.command)
    os.write(pair.command, b"the last")
    os.close(another)
    os.dup2(os.open("/dev/null", os.O_RDONLY), pair.command)
    assert (await pair.show(), await pair.show()) == (b"the last", b"")
    assert not pair.terminal.output.is_open
    # There is nobody to type to, and that is no error.
    await pair.terminal.send(b"anybody?\n")
    await pair.terminal.end()


async def test_input_may_be_let_go_before_the_output(pair: Pair) -> None:
    pair.terminal.close()
    pair.terminal.close()
    os.write(pair.command, b"still here")
    assert await pair.show() == b"still here"
    await pair.terminal.send(b"ignored")
    await pair.terminal.end()


async def test_its_descriptors_are_close_on_exec(pair: Pair) -> None:
    assert not os.get_inheritable(pair.terminal._descriptor)
    assert not os.get_inheritable(pair.terminal.output._descriptor)
