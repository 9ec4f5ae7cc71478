"""mkfs.erofs(1): a tar in, an EROFS image out that takes the contents of files from that tar."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
from pathlib import Path

from agent.linux.programs import path_of

# The same tar makes the same image: no time of building, no random UUID.
_OPTIONS = (
    "--tar=i",
    "--aufs",
    "--quiet",
    "-T0",
    "--mkfs-time",
    "-U00000000-0000-0000-0000-000000000000",
)
_PACKAGE = "install erofs-utils 1.8.6 or newer (Debian: apt-get install erofs-utils)"
_TOO_OLD = re.compile(r"unrecognized option|invalid extended option|unknown extended option")
_LEVEL = re.compile(r"^<E> \w+:")
_ERRNO = re.compile(r"\[Error (\d+)\]")

_LONGEST_STDERR = 4096

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = {"PATH": _PATH}


class MkfsError(Exception):
    """mkfs.erofs made no image; the text is its own cause, and ``__cause__`` its errno if any."""


class MkfsErofs:
    """A running mkfs.erofs, which reads ``tar`` and writes ``image``.

    Used by one thread; any may ``kill`` it. The caller closes it, whatever happens, and removes the
    image if it did not finish.

    Raises:
        MkfsError: there is no such program.
    """

    def __init__(self, program: str, tar: Path, image: Path, memory_bytes: int) -> None:
        try:
            with tar.open("rb") as stdin:
                process = subprocess.Popen(
                    [program, *_OPTIONS, os.fspath(image)],
                    executable=path_of(program, _PATH),
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=_ENVIRONMENT,
                )
        except FileNotFoundError:
            raise MkfsError(f"{program} is missing: {_PACKAGE}") from None
        assert process.stderr is not None
        self._program = program
        self._process = process
        self._stderr = process.stderr
        self._said = b""
        # Its memory grows with the number and length of the names, which a layer decides on.
        resource.prlimit(process.pid, resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")

    def finish(self) -> None:
        """Block until the image is complete.

        Raises:
            MkfsError: it gave up.
        """
        self._end()
        if self._process.returncode != 0:
            raise self._failure()

    def kill(self) -> None:
        """End it, from any thread: what waits for it then raises MkfsError."""
        self._process.kill()

    def close(self) -> None:
        """End it unless it has ended; nothing of it is left."""
        self.kill()
        self._end()

    def _end(self) -> None:
        """Wait for its exit, hearing it out."""
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
    """Kill the mkfs.erofs that writes ``image`` for an agent that is gone, if there is one.

    It may be long about it, and nobody waits for its image any more. Raises OSError.
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
