"""What processes write that nobody listens to: on disk, bounded, and still there afterwards.

    logs/<pid or container id>/output      the newest, at most 4 MiB
                               output.1    what came before it, at most 4 MiB
                               pipe        the FIFO that the processes write to
                               ended       there when they have ended

The processes hold the FIFO open for reading too (see ``pipes``), so an agent that was killed
leaves them waiting at worst, and the next one goes on reading where it stopped.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import attrs
import trio

from agent.errors import failing_as
from agent.processes.pipes import OutputPipe
from protocol.errors import ErrorCode

FILE_BYTES = 4 * 1024 * 1024
# Logs of processes that have ended; the oldest go first.
_KEPT_AFTER_THE_END = 16
_THREADS = 8
_NEW = "+new-"


@attrs.define(eq=False)
class OutputLog:
    """The log of one process and its descendants. Made by ``OutputLogs``."""

    directory: Path
    _file: int | None = None
    _size_bytes: int = 0

    @property
    def fifo(self) -> Path:
        """What the processes write to."""
        return self.directory / "pipe"

    def open_reader(self) -> OutputPipe:
        """The end to read from. Opened before the processes are started: raises OSError."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return OutputPipe(os.open(self.fifo, flags))

    def name(self, name: str) -> None:
        """Move it to where it is looked for; an older one of that name goes. Blocks."""
        named = self.directory.with_name(name)
        shutil.rmtree(named, ignore_errors=True)
        self.directory.rename(named)
        self.directory = named

    def take(self, pipe: OutputPipe) -> bool:
        """Append what lies in ``pipe``; what is older than the newest 4 to 8 MiB goes.

        Returns whether more may come. Blocks; raises OSError.
        """
        file = self._opened()
        moved_bytes = pipe.move(file, FILE_BYTES - self._size_bytes)
        self._size_bytes += moved_bytes or 0
        return moved_bytes != 0

    def end(self) -> None:
        """Nothing more will be written: it stays to be read. Blocks."""
        self.close()
        with suppress(OSError):
            self.fifo.unlink(missing_ok=True)
            (self.directory / "ended").touch()

    def remove(self) -> None:
        """Of a process that never was. Blocks."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _opened(self) -> int:
        """The file to append to, with room in it."""
        if self._size_bytes >= FILE_BYTES:
            self.close()
            (self.directory / "output").rename(self.directory / "output.1")
        if self._file is None:
            # Not O_APPEND, which splice(2) refuses.
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self.directory / "output", flags, 0o600)
            self._size_bytes = os.lseek(self._file, 0, os.SEEK_END)
            return self._opened()
        return self._file


@attrs.define(eq=False)
class OutputLogs:
    """All of them, below one directory, which is made if it is missing."""

    directory: Path
    _threads: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, _THREADS))

    def new(self) -> OutputLog:
        """One without a name yet. Blocks.

        Raises:
            AgentError: INTERNAL_ERROR; the directory cannot be written to.
        """
        with failing_as(ErrorCode.INTERNAL_ERROR, f"make a log in {self.directory}"):
            self.directory.mkdir(parents=True, mode=0o700, exist_ok=True)
            log = OutputLog(self.directory / f"{_NEW}{secrets.token_hex(8)}")
            log.directory.mkdir(mode=0o700)
            os.mkfifo(log.fifo, 0o600)
        return log

    def of(self, name: str) -> OutputLog:
        """The one of that name, which an earlier agent made."""
        return OutputLog(self.directory / name)

    async def follow(self, log: OutputLog, pipe: OutputPipe) -> None:
        """Write what comes out of ``pipe`` to the log, until no process has it open any more.

        A disk that is full loses output, and stops no process.
        """
        more_may_come = True
        while more_may_come:
            # First, since nobody is told of the end of those who had ended before it was opened.
            try:
                more_may_come = await trio.to_thread.run_sync(log.take, pipe, limiter=self._threads)
            except OSError:
                more_may_come = pipe.read() != b""
            if more_may_come:
                await pipe.readable()

    def tidy(self) -> None:
        """Remove what is too old, and what a crash left unfinished. Blocks."""
        ended = []
        for directory in self._directories():
            with suppress(OSError):
                if (directory / "ended").exists():
                    ended.append(((directory / "ended").stat().st_mtime_ns, directory))
        for _, directory in sorted(ended)[:-_KEPT_AFTER_THE_END]:
            shutil.rmtree(directory, ignore_errors=True)

    def forget_unfinished(self) -> None:
        """Remove those that never got a name: whoever made them has died. Blocks."""
        for directory in self._directories():
            if directory.name.startswith(_NEW):
                shutil.rmtree(directory, ignore_errors=True)

    def unended(self) -> list[str]:
        """The names of those that are still written to, or were when an agent died. Blocks."""
        return [
            directory.name
            for directory in self._directories()
            if not directory.name.startswith(_NEW) and not (directory / "ended").exists()
        ]

    def _directories(self) -> list[Path]:
        try:
            return list(self.directory.iterdir())
        except FileNotFoundError:
            return []
