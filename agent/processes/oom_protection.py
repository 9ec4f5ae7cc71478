"""The agent is never killed for memory, and what it starts is."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import attrs

from agent.errors import cause_of
from agent.processes.cgroup import Cgroup

log = logging.getLogger(__name__)

# Documentation/filesystems/proc.rst, 3.1: never killed; neither more nor less than others.
OOM_SCORE_ADJ_MIN = -1000
OOM_SCORE_ADJ_OF_CHILDREN = 0

# Only what a file system does not answer takes longer, and that forks nothing.
_FREEZING_S = 1


@attrs.frozen
class OomProtection:
    """Of this process, from being killed for memory; without arguments there is none."""

    _own: int | None = None
    _of_children: int = OOM_SCORE_ADJ_OF_CHILDREN

    @classmethod
    @contextmanager
    def held(
        cls, own: int = OOM_SCORE_ADJ_MIN, of_children: int = OOM_SCORE_ADJ_OF_CHILDREN
    ) -> Iterator[OomProtection]:
        """Protect this process for the block; a protection that is none where that is refused.

        ``own`` is the oom_score_adj that it has, less than what it was takes CAP_SYS_RESOURCE;
        ``of_children`` is what children have after ``unprotect``, and until then they have ours.
        """
        protection = cls()
        with ExitStack() as undo:
            try:
                file = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
                undo.callback(os.close, file)
                before = os.pread(file, 16, 0)
                os.pwrite(file, b"%d" % own, 0)
                undo.callback(os.pwrite, file, before, 0)
                protection = cls(own, of_children)
            except OSError as error:
                log.warning("the agent may be killed for memory: %s", cause_of(error))
            yield protection

    def unprotect(self, pid: int, cgroup: Cgroup | None) -> None:
        """Take the protection from a child that was just spawned, and from what it has forked.

        ``cgroup`` is where it was born, the first one there; nobody reaps the pid meanwhile. For a
        worker thread: blocks until the child is about to run its program's own instructions.

        Born without the protection it could be the agent's death. vfork(2) wakes the parent a
        little before the child stops sharing its memory, and whom the OOM killer picks then dies
        with all who share it. SIGSTOP works on the way out of the kernel, when that is over.

        An agent that is killed here leaves the child stopped and protected, in a cgroup that
        nobody has marked as kept yet; so its successor ends it.
        """
        if self._own is None:
            return
        os.kill(pid, signal.SIGSTOP)
        # Or ended already, by whatever hand; whoever waits for that does so later.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            self._change(pid)
            # With the child stopped, whatever is forked is forked by one of these.
            if cgroup is not None and set(cgroup.members()) - {pid}:
                self._change_all(cgroup)
        except OSError as error:
            log.warning("a command is never killed for memory: %s", cause_of(error))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _change_all(self, cgroup: Cgroup) -> None:
        """Those that the child has forked before it was stopped, and what these have forked.

        A process has its parent's value from early in fork(2), and is seen in a cgroup only at the
        end of that. In a cgroup that is frozen nobody is in between.
        """
        with cgroup.frozen(_FREEZING_S):
            for pid in cgroup.pids():
                self._change(pid)

    def _change(self, pid: int) -> None:
        """Unless it is gone, or has another value: who has that has chosen it."""
        try:
            file = os.open(f"/proc/{pid}/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            with suppress(ProcessLookupError):
                if int(os.pread(file, 16, 0)) == self._own:
                    os.pwrite(file, b"%d" % self._of_children, 0)
        finally:
            os.close(file)
