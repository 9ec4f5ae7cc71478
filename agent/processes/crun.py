"""One invocation of crun: what it is given, and how it tells what became of it.

    <directory>/config.json or process.json   what to run
                pid                           a FIFO: crun writes the process's pid to it once all
                                              is made and nothing but exec is left to do
                log                           crun's own complaints, apart from the command's stderr
                console                       a socket for the terminal's descriptor, if it has one

A FIFO and not a file for the pid, so that it is an event.
"""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import attrs
import trio

from agent.processes.process import Process
from agent.processes.terminal import Terminal

_PID_BYTES = 32
_NAMES = ("process.json", "pid", "log", "console")


@attrs.define(eq=False)
class Invocation:
    """A directory of its own, and descriptors; made by ``prepare``, and ended by ``remove``."""

    directory: Path
    _pid_fifo: int
    _console: socket.socket | None
    _peer: socket.socket | None = None
    """crun, at the other end of the console's socket."""
    pid: int | None = None
    """Of the process in the container, as the VM sees it; None as long as crun has not told it."""

    @classmethod
    def prepare(cls, directory: Path, *, terminal: bool) -> Invocation:
        """Make the directory's FIFO and socket; it exists. Blocks.

        Raises:
            OSError: it is not writable.
        """
        with ExitStack() as undo:
            fifo = directory / "pid"
            os.mkfifo(fifo, 0o600)
            pid_fifo = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            undo.callback(os.close, pid_fifo)
            console = undo.enter_context(_listening(directory)) if terminal else None
            undo.pop_all()
        return cls(directory, pid_fifo, console)

    @property
    def log(self) -> Path:
        """For crun's option --log."""
        return self.directory / "log"

    @property
    def options(self) -> list[str]:
        """What `crun run` and `crun exec` are told of it."""
        options = [f"--pid-file={self.directory / 'pid'}"]
        if self._console is not None:
            options.append(f"--console-socket={self.directory / 'console'}")
        return options

    async def started(self, process: Process) -> bool:
        """Wait until crun has made all and only exec is left; False if it ended before.

        ``process`` is crun. The terminal, if it has one, becomes the process's.
        """
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await process.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            if self._console is not None:
                while not self._take_terminal(process):
                    await trio.lowlevel.wait_readable(self._peer or self._console)
            await trio.lowlevel.wait_readable(self._pid_fifo)
            nursery.cancel_scope.cancel()
        if process.terminal is None:
            # Of a command that is over already: what it has written waits in there.
            self._take_terminal(process)
        return self.has_started()

    def has_started(self) -> bool:
        """The same, as of now."""
        if self.pid is None:
            with suppress(BlockingIOError, ValueError):
                self.pid = int(os.read(self._pid_fifo, _PID_BYTES))
        return self.pid is not None

    def _take_terminal(self, process: Process) -> bool:
        """Let the process have the terminal that crun sends; False if there is none yet."""
        if self._console is None:
            return False
        try:
            if self._peer is None:
                self._peer, _ = self._console.accept()
                self._peer.setblocking(False)
            _, descriptors, _, _ = socket.recv_fds(self._peer, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        if descriptors:
            process.attach_terminal(Terminal(descriptors[0]))
        return True

    def complaint(self) -> str:
        """What crun said that went wrong, in one line; "" if nothing. Blocks."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "; ".join(filter(None, map(str.strip, text.splitlines())))

    def close(self) -> None:
        """Let go of its descriptors."""
        os.close(self._pid_fifo)
        for console in (self._console, self._peer):
            if console is not None:
                console.close()

    def remove(self) -> None:
        """Remove the directory of what joined a container: what is told above, and little else."""
        for name in _NAMES:
            with suppress(FileNotFoundError):
                os.unlink(f"{self.directory}/{name}")  # noqa: PTH108 for every command
        try:
            self.directory.rmdir()
        except OSError:
            shutil.rmtree(self.directory, ignore_errors=True)


def _listening(directory: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # An address has at most 108 bytes (unix(7)), and paths may be longer.
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{handle}/console")
        listener.listen(1)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(handle)
    return listener
