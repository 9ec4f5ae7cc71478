"""Our own standard streams, read and written around their buffers, holding nothing else up."""

import os
from contextlib import suppress
from typing import Final

import trio

from protocol.cli.connection import CommandFailed

_CHUNK_SIZE: Final = 64 * 1024
_STREAM_FAILED: Final = 1


async def read_some(fd: int, most_bytes: int = _CHUNK_SIZE) -> bytes:
    """Some bytes, or none at the end. What is not read when cancelled is left to others.

    The descriptor is not made non-blocking: it is shared with whoever started us.
    """
    try:
        while True:
            # Nobody waits for a file, or for a device like /dev/null: EPERM, see epoll_ctl(2).
            with suppress(PermissionError):
                await trio.lowlevel.wait_readable(fd)
            try:
                # In a thread, since others may have read what was there.
                return await trio.to_thread.run_sync(
                    os.read, fd, most_bytes, abandon_on_cancel=True
                )
            except BlockingIOError:
                continue
    except OSError as error:
        cause = error.strerror or error
        raise CommandFailed(f"cannot read the input: {cause}", _STREAM_FAILED) from error


async def write_all(fd: int, data: bytes) -> None:
    """Write all of it.

    In a thread: a reader that stalls holds up neither our input nor a signal.

    Raises BrokenPipeError when our reader is gone, CommandFailed when it fails otherwise.
    """
    left = memoryview(data)
    try:
        while left:
            try:
                count = await trio.to_thread.run_sync(os.write, fd, left, abandon_on_cancel=True)
                left = left[count:]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(fd)
    except BrokenPipeError:
        raise
    except OSError as error:
        cause = error.strerror or error
        raise CommandFailed(f"cannot write the output: {cause}", _STREAM_FAILED) from error
