"""The agent is the last that the kernel kills for memory, and its children are not."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType

import attrs

from agent.errors import cause_of

log = logging.getLogger(__name__)

# Documentation/filesystems/proc.rst, 3.1: never killed; neither more nor less than others.
OOM_SCORE_ADJ_MIN = -1000
OOM_SCORE_ADJ_OF_CHILDREN = 0

_UNPROTECTED: AbstractContextManager[None] = nullcontext()


class _Lift:
    """Children's oom_score_adj for this process while any thread is inside, else its own.

    A child has what its parent had at the moment of the clone. To write it afterwards would be too
    late for what the child itself had forked by then, and posix_spawn(3) cannot set it.
    """

    def __init__(self, file: int, own: bytes, of_children: bytes) -> None:
        self._file = file
        self._own = own
        self._of_children = of_children
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                os.pwrite(self._file, self._of_children, 0)
            self._inside += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._protect()

    def _protect(self) -> None:
        try:
            os.pwrite(self._file, self._own, 0)
        except OSError as error:
            # What was started in here runs, and must not be lost for this.
            log.warning("the agent may be killed for memory: %s", cause_of(error))


@attrs.frozen
class OomProtection:
    """Of this process, from being killed for memory; without arguments there is none."""

    _lift: _Lift | None = None

    @classmethod
    @contextmanager
    def held(
        cls, own: int = OOM_SCORE_ADJ_MIN, of_children: int = OOM_SCORE_ADJ_OF_CHILDREN
    ) -> Iterator[OomProtection]:
        """Protect this process for the block; a protection that is none where that is refused.

        ``own`` is the oom_score_adj that it has, less than what it was takes CAP_SYS_RESOURCE;
        ``of_children`` is what children get that are started within ``lifted``.
        """
        protection = cls()
        with ExitStack() as undo:
            try:
                file = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
                undo.callback(os.close, file)
                before = os.pread(file, 16, 0)
                os.pwrite(file, b"%d" % own, 0)
                undo.callback(os.pwrite, file, before, 0)
                protection = cls(_Lift(file, b"%d" % own, b"%d" % of_children))
            except OSError as error:
                log.warning("the agent may be killed for memory: %s", cause_of(error))
            yield protection

    def lifted(self) -> AbstractContextManager[None]:
        """For the time of a spawn, from any thread: children do not inherit the protection.

        Costs two writes of a microsecond each, and nothing where there is no protection. While any
        thread is in here the agent is as any other process; a program whose file system does not
        answer prolongs that.
        """
        return _UNPROTECTED if self._lift is None else self._lift
