"""mkfs.erofs(1) at the end of a pipe: a tar in, an EROFS image out."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import select
import signal
import subprocess
from pathlib import Path

# Content goes from the pipe to where it stays, in one pass (`--sort=none`, no inlining): three
# times as fast as the default, which writes it past the image's end first and copies it from
# there. The same tar makes the same image: no time of building, no random UUID.
_OPTIONS = (
    "--tar=f",
    "--aufs",
    "--quiet",
    "--sort=none",
    "-Enoinline_data",
    "-T0",
    "--mkfs-time",
    "-U00000000-0000-0000-0000-000000000000",
)
_PACKAGE = "install erofs-utils 1.8.6 or newer (Debian: apt-get install erofs-utils)"
_TOO_OLD = re.compile(r"unrecognized option|invalid extended option|unknown extended option")
_LEVEL = re.compile(r"^<E> \w+:")
_ERRNO = re.compile(r"\[Error (\d+)\]")

_PIPE_BYTES = 1 << 20
_BATCH_BYTES = 128 << 10
_LONGEST_STDERR = 4096

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


class MkfsError(Exception):
    """mkfs.erofs made no image; the text is its own cause, and ``__cause__`` its errno if any."""


class MkfsErofs:
    """A running mkfs.erofs, which writes ``image``. Used by one thread; any may ``kill`` it.

    The caller closes it, whatever happens, and removes the image if it did not finish.

    Raises:
        MkfsError: there is no such program.
    """

    def __init__(self, program: str, image: Path, memory_bytes: int) -> None:
        try:
            process = subprocess.Popen(
                [program, *_OPTIONS, os.fspath(image)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=_ENVIRONMENT,
            )
        except FileNotFoundError:
            raise MkfsError(f"{program} is missing: {_PACKAGE}") from None
        assert process.stdin is not None
        assert process.stderr is not None
        self._program = program
        self._process = process
        self._stdin = process.stdin
        self._stderr = process.stderr
        self._said = b""
        self._batch: list[bytes | memoryview] = []
        self._batch_bytes = 0
        # Its memory grows with the number and length of the names, which a layer decides on.
        resource.prlimit(process.pid, resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        fcntl.fcntl(self._stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(self._stdin.fileno(), False)
        self._poll = select.poll()
        self._poll.register(self._stdin, select.POLLOUT)
        self._poll.register(self._stderr, select.POLLIN)

    def write(self, piece: bytes | memoryview) -> None:
        """Hand over the tar's next bytes; blocks while mkfs.erofs is behind.

        Raises:
            MkfsError: it gave up.
        """
        self._batch.append(piece)
        self._batch_bytes += len(piece)
        if self._batch_bytes >= _BATCH_BYTES:
            self._send_batch()

    def finish(self) -> None:
        """The tar is complete; blocks until the image is.

        Raises:
            MkfsError: it gave up.
        """
        self._send_batch()
        self._end()
        if self._process.returncode != 0:
            raise self._failure()

    def kill(self) -> None:
        """End it, from any thread: what it was doing or will be told then raises MkfsError."""
        self._process.kill()

    def close(self) -> None:
        """End it unless it has ended; nothing of it is left."""
        self.kill()
        self._end()

    def _send_batch(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        view = memoryview(batch[0] if len(batch) == 1 else b"".join(batch))
        while view:
            try:
                view = view[os.write(self._stdin.fileno(), view) :]
            except BlockingIOError:
                self._wait()
            except BrokenPipeError:
                self._end()
                failure = self._failure()
                raise failure from failure.__cause__

    def _wait(self) -> None:
        """Until there is room in the pipe; meanwhile mkfs.erofs may complain at length."""
        for fd, _ in self._poll.poll():
            if fd == self._stderr.fileno():
                said = os.read(fd, _LONGEST_STDERR)
                self._said = (self._said + said)[-_LONGEST_STDERR:]
                if not said:
                    self._poll.unregister(fd)

    def _end(self) -> None:
        """Wait for its exit, hearing it out."""
        self._stdin.close()
        if not self._stderr.closed:
            while said := self._stderr.read(_LONGEST_STDERR):
                self._said = (self._said + said)[-_LONGEST_STDERR:]
            self._stderr.close()
        self._process.wait()

    def _failure(self) -> MkfsError:
        status = self._process.returncode
        if status < 0:
            return MkfsError(f"mkfs.erofs ended by {signal.Signals(-status).name}")
        said = self._said.decode(errors="replace")
        if _TOO_OLD.search(said):
            return MkfsError(f"{self._program} is too old: {_PACKAGE}")
        # Each line once, and the last word, "Could not format the device", only if it is the only.
        lines = dict.fromkeys(_LEVEL.sub("", line).strip() for line in said.splitlines())
        causes = [line for line in lines if line]
        text = "; ".join(causes[:-1] or causes) or f"it ended with status {status}"
        error = MkfsError(f"mkfs.erofs: {text}")
        error.__cause__ = _os_error(said)
        return error


def end_orphan(image: Path) -> None:
    """Kill the mkfs.erofs that writes ``image``, which nobody feeds any more, if there is one.

    Its agent was killed: with the rest of the tar missing it turns in a loop for ever, and keeps
    what it has written, whoever unlinks it. Raises OSError.
    """
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(image) in words:
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended by itself


def _os_error(said: str) -> OSError | None:
    """What the operating system refused, as far as it can be told from the messages."""
    for number in (errno.ENOSPC, errno.EDQUOT):  # also where it sums up with EIO
        if os.strerror(number) in said:
            return OSError(number, os.strerror(number))
    found = _ERRNO.search(said)
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found is not None else None
