"""A pseudo-terminal (pty(7)): a command's three standard streams as one, with line editing."""

from __future__ import annotations

import errno
import fcntl
import os
import termios
from contextlib import ExitStack

import attrs
import trio

from agent.processes.pipes import InputPipe, OutputPipe


@attrs.frozen
class Size:
    """Of a terminal, in characters."""

    columns: int
    rows: int


DEFAULT_SIZE = Size(80, 24)


class Terminal(InputPipe):
    """The agent's side of a terminal: what is typed goes in, and ``output`` comes out."""

    def __init__(self, master: int) -> None:
        """Takes ``master`` over. ``close`` leaves ``output`` open, which closes at its own end."""
        # A descriptor for each direction, since each ends in its own time.
        super().__init__(fcntl.fcntl(master, fcntl.F_DUPFD_CLOEXEC, 3))
        self.output = OutputPipe(master)

    async def send(self, data: bytes) -> None:
        """Type ``data``; dropped where nobody has the terminal open any more."""
        try:
            await super().send(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            await trio.lowlevel.checkpoint()

    async def end(self) -> None:
        """Type the end-of-file character, twice: a first one after an unfinished line ends that
        line only (termios(3), VEOF)."""
        if not self.is_open:
            return
        veof = termios.tcgetattr(self._descriptor)[6][termios.VEOF]
        assert isinstance(veof, bytes)
        await self.send(veof * 2)

    def resize(self, size: Size) -> None:
        """Tell the kernel, which tells the programs in the foreground (SIGWINCH)."""
        if self.is_open:
            set_size(self._descriptor, size)


def set_size(terminal: int, size: Size) -> None:
    """Give a terminal's either end its size; raises termios.error."""
    termios.tcsetwinsize(terminal, (size.rows, size.columns))


def open_terminal(ours: ExitStack, theirs: ExitStack) -> tuple[int, str]:
    """A new terminal's master, and the path that a command opens; both closed with two stacks.

    Raises OSError.
    """
    master, slave = os.openpty()
    ours.callback(os.close, master)
    # Open until the command has it too: else the master would see an end in between.
    theirs.callback(os.close, slave)
    set_size(master, DEFAULT_SIZE)
    return master, os.ttyname(slave)
