"""The one kind of error that the agent's parts raise for a host to read."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.errors import ErrorCode


class AgentError(Exception):
    """A request that failed: what was being done to what, and the cause.

    Only ``session.py`` turns one into a frame, so ``message`` is written for a host's user: one
    line, no secrets, and the way out where there is one.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@contextmanager
def failing_as(code: ErrorCode, doing: str) -> Iterator[None]:
    """Translate what the operating system refuses into ``AgentError(code, "doing: cause")``.

    ``doing`` says what was being done to what ("format /dev/vda"). OSError and subprocess's
    failures are translated; an AgentError passes as it is, since it was translated where more
    was known; anything else is a defect of ours and passes too.
    """
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise AgentError(code, f"{doing}: {cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """The cause as one line for people: strerror and the file it is about, never a repr."""
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr or error.output or b""
        text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        program = error.cmd[0] if isinstance(error.cmd, (list, tuple)) else error.cmd
        return f"{program} ended with status {error.returncode}" + (f": {last}" if last else "")
    if isinstance(error, OSError) and error.strerror:
        about = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{about}"
    return " ".join(str(error).split()) or type(error).__name__
