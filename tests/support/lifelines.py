"""Learning that processes here have started and ended, from a FIFO that they hold open."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs
import trio

from tests.support.machine import Machine


@attrs.frozen
class Lifeline:
    """A FIFO that processes write to once to say that they run, and hold open as they live."""

    path: Path
    """As the processes see it."""
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

    def is_let_go(self) -> bool:
        """Whether no process holds it now; what has been said is forgotten."""
        try:
            while os.read(self._descriptor, 4096):
                pass
        except BlockingIOError:
            return False
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
def lifeline(directory: Path, seen_as: Path | None = None) -> Iterator[Lifeline]:
    """A new FIFO in ``directory``, which its processes call ``seen_as``; gone after the block."""
    path = directory / "lifeline"
    os.mkfifo(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield Lifeline((seen_as or directory) / path.name, descriptor)
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def lifeline_in(
    machine: Machine, inside: str = "/tmp", seen_as: str | None = None
) -> Iterator[Lifeline]:
    """One for processes of a machine of namespaces, which needs no agent and outlasts several.

    It is below ``inside``, which the processes call ``seen_as``.
    """
    with TemporaryDirectory(dir=machine.path(inside), ignore_cleanup_errors=True) as directory:
        here = Path(directory)
        here.chmod(0o755)
        with lifeline(here, Path(seen_as or inside, here.name)) as line:
            (here / "lifeline").chmod(0o666)
            yield line
