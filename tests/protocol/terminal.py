"""`innkeep` on a pseudo-terminal, and the person in front of it."""

import os
import signal
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pexpect
import trio
from pexpect.fdpexpect import fdspawn

from tests.protocol.sessions import PROJECT, command

PATIENCE_S = 30
SIZE = (80, 24)


class Terminal:
    """What a person sees and does; ``process`` is the program, whose controlling terminal it is."""

    def __init__(self, fd: int, process: trio.Process) -> None:
        self.process = process
        self._fd = fd
        self._screen = fdspawn(fd, timeout=PATIENCE_S)

    async def see(self, *patterns: str) -> bytes:
        """Wait until a regular expression of these is on the screen, or in the text.

        What is behind it is left for the next call; what came before it, and it, is returned.
        """
        await trio.to_thread.run_sync(self._screen.expect, list(patterns))
        return bytes(self._screen.before + self._screen.after)

    async def type(self, keys: str) -> None:
        """Press keys: ``\\r`` is the return key, ``\\x03`` is ^C."""
        await trio.to_thread.run_sync(self._screen.send, keys)

    def resize(self, columns: int, rows: int) -> None:
        """Pull at the window's corner."""
        # What pexpect's setwinsize does, which there is for its own children only.
        termios.tcsetwinsize(self._fd, (rows, columns))

    @property
    def modes(self) -> list[Any]:
        """How the terminal treats keys and output, see termios(3)."""
        return termios.tcgetattr(self._fd)

    @property
    def is_raw(self) -> bool:
        """Whether keys are bytes for the program, none of them a signal or an edit."""
        return not self.modes[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    async def rest(self) -> bytes:
        """What is on the screen besides, once the program has ended."""
        await trio.to_thread.run_sync(self._screen.expect, pexpect.EOF)
        return bytes(self._screen.before)

    async def exit_code(self) -> int:
        """Wait for the program's end; the negative number of the signal that ended it."""
        return await self.process.wait()

    def hang_up(self) -> None:
        """Close the window."""
        self._screen.close()


@asynccontextmanager
async def on_terminal(
    address: str, *arguments: str, size: tuple[int, int] = SIZE, **streams: int
) -> AsyncIterator[Terminal]:
    """Run `innkeep` on a terminal of this size; killed at the end of the block if it still runs.

    ``streams`` are those that lead elsewhere.
    """
    # Not by pexpect: Python warns of a fork in a process that has threads.
    ours, theirs = os.openpty()
    try:
        termios.tcsetwinsize(ours, size[::-1])
        process = await trio.lowlevel.open_process(
            # Whoever runs the tests may ignore signals, as nohup does, and that is inherited.
            ["env", "--default-signal", "setsid", "--ctty", *command(address, *arguments)],
            cwd=PROJECT,
            **{"stdin": theirs, "stdout": theirs, "stderr": theirs, **streams},
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    terminal = Terminal(ours, process)
    try:
        yield terminal
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            await process.wait()
        terminal.hang_up()
