"""Having on the disks what was written: before the power is cut, and whatever else hangs."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

from agent.errors import cause_of
from agent.linux.programs import path_of
from agent.linux.syncfs import syncfs

log = logging.getLogger(__name__)


def write_back(directory: Path) -> None:
    """Have all of the file system that a directory is on be on its disk. Blocks.

    What fails is logged: it is done before a file system is let go of, and that goes on.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syncfs(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.error("write %s back: %s", directory, cause_of(error))


def write_back_everything() -> None:
    """sync(2), in a process of its own: a share whose host is gone keeps who asks for ever, and
    cannot even be killed; this one merely waits for the process. Blocks.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be done.
    """
    subprocess.run(
        ["sync"],
        executable=path_of("sync"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
    )
