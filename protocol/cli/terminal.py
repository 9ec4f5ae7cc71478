"""Our own terminal, while it stands for one in the VM."""

import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

from protocol.requests import Resize

_ENDING: Final = (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)


def size() -> Resize | None:
    """The size of the terminal that output goes to, or else input comes from; None without one."""
    for stream in (sys.stdout, sys.stdin):
        if stream is not None and stream.isatty():
            columns, lines = os.get_terminal_size(stream.fileno())
            # 0 by 0 is a terminal that does not know: a serial line, or one that nobody sized.
            return Resize(columns, lines) if columns and lines else None
    return None


@contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Every key is a byte for the reader of this terminal; as it was before when the block ends.

    Also when a signal ends the whole program. To be used in the main thread.
    """
    saved = termios.tcgetattr(fd)

    def restore() -> None:
        # A terminal that has hung up takes no modes any more.
        with suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, saved)

    def end(number: int, _: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    # What nohup had us ignore stays ignored.
    handled = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in handled:
            signal.signal(number, end)
        # At once: what was typed before is input too, and is not to be flushed.
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        restore()
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
