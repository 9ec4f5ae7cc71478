"""Learning that processes here have started and ended, from a FIFO that they hold open."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio


@attrs.frozen
class Lifeline:
    """A FIFO that processes write to once to say that they run, and hold open as they live."""

    path: Path
    _descriptor: int

    def script(self, then: str) -> str:
        """A shell script that takes hold of it, says so, and goes on with ``then``."""
        return f"exec 9>'{self.path}'; printf . >&9; {then}"

    async def heard(self) -> None:
        """Wait until a process that took hold of it has said so."""
        assert await self._read() == b".", "nobody holds the lifeline any more"

    async def ended(self) -> None:
        """Wait until no process holds it any more."""
        while await self._read():
            pass

    def is_held(self) -> bool:
        """Whether a process holds it now; what was written must have been heard."""
        try:
            return os.read(self._descriptor, 1) != b""
        except BlockingIOError:
            return True

    async def _read(self) -> bytes:
        while True:
            # Waiting comes first: to read before the first process has it open is to see an end.
            await trio.lowlevel.wait_readable(self._descriptor)
            try:
                return os.read(self._descriptor, 1)
            except BlockingIOError:
                continue


@contextmanager
def lifeline(directory: Path) -> Iterator[Lifeline]:
    """A new FIFO in ``directory``."""
    path = directory / "lifeline"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield Lifeline(path, descriptor)
    finally:
        os.close(descriptor)
