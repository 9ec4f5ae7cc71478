"""Kernel modules that the VM can do without until it serves."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from agent.errors import cause_of
from agent.linux.module import finit_module

log = logging.getLogger(__name__)

FOLDER = Path("/usr/lib/innkeep/modules")
# In the folder: names of files, in the order of loading.
LIST = "later"

# There already; of a kernel that is not the image's, or has no modules; nothing there to drive.
_EXPECTED = frozenset(
    {errno.EEXIST, errno.ENOEXEC, errno.ENOSYS, errno.ENODEV, errno.EOPNOTSUPP, errno.EPERM}
)


def load_later(
    folder: Path = FOLDER, finit_module: Callable[[int], None] = finit_module
) -> list[str]:
    """Load what the image has for later; the names of those that are loaded now. Blocks.

    None is needed: one that cannot be loaded is logged.
    """
    loaded = []
    listed = folder / LIST
    for name in listed.read_text().split() if listed.exists() else ():
        try:
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                finit_module(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            level = logging.DEBUG if error.errno in _EXPECTED else logging.WARNING
            log.log(level, "load %s: %s", name, cause_of(error))
        else:
            loaded.append(name.partition(".")[0])
    return loaded
