"""The programs that the agent runs for itself, by their paths: for subprocess's ``executable``.

Given a path, subprocess starts a program by posix_spawn(3). Given a name, it does so by a vfork(2)
of its own, whose child first waits for a lock of glibc's that each posix_spawn under way has until
its program is executed (since 2.41: sigaction(3) of SIGABRT). It waits with the interpreter's lock
held, so that a command whose file system does not answer would stop all of the agent. And where the
agent is killed meanwhile it waits for ever, with all that the agent had open, its port among it.
"""

from __future__ import annotations

import errno
import os
import shutil


def path_of(program: str, search: str | None = None) -> str:
    """Where a program is; what is a path already stays as it is.

    ``search`` are directories between colons, without it those of PATH.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    if "/" in program:
        return program
    found = shutil.which(program, path=search)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
    return found
