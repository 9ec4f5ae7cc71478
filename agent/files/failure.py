"""What the kernel has against a file, in words for a host."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from agent.errors import AgentError
from agent.files.guest_path import GuestPath
from protocol.errors import ErrorCode

_HINTS = {
    errno.ELOOP: "too many symbolic links, or one of /proc that is no path",
    errno.EXDEV: "it lies on another mount",
    errno.EAGAIN: "it is not to be had now; try again",
}


@contextmanager
def failing_on(
    doing: str, path: GuestPath, *, missing: ErrorCode = ErrorCode.FILE_IO_FAILED
) -> Iterator[None]:
    """Translate OSError into FILE_IO_FAILED, "doing path: cause"; ``missing`` is the code for what
    is not there, where requests that only newer hosts send tell it from the rest."""
    try:
        yield
    except OSError as error:
        cause = _HINTS.get(error.errno or 0) or error.strerror or str(error)
        code = missing if isinstance(error, FileNotFoundError) else ErrorCode.FILE_IO_FAILED
        raise AgentError(code, f"{doing} {path}: {cause}") from error
