"""Unix sockets at paths that a person chose."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from initramfs.errors import BootError

# sun_path of unix(7), less its final NUL.
LONGEST_PATH = 107
# As often as hosts look for a booting machine: neither end has an event for "listens now".
_INTERVAL_S = 0.02


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep a path for a socket that somebody will make there; it is removed afterwards.

    Raises:
        BootError: no socket can be there, or one that is in use is.
    """
    if len(bytes(path)) > LONGEST_PATH:
        raise BootError(f"{path}: a socket's path has at most {LONGEST_PATH} bytes")
    if not path.parent.is_dir():
        raise BootError(f"{path}: there is no such directory")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            path.unlink()
        except OSError as error:
            raise BootError(f"{path}: {error.strerror}") from error
        else:
            raise BootError(f"{path}: another machine listens there")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


async def connected(path: Path) -> socket.socket:
    """A connection to a socket as soon as somebody listens there; the caller's to close."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            await trio.sleep(_INTERVAL_S)
        else:
            return connection
