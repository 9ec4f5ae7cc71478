"""The agent is never killed for memory, and what it starts is."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs

from agent.errors import cause_of

log = logging.getLogger(__name__)

# Documentation/filesystems/proc.rst, 3.1: never killed; neither more nor less than others.
OOM_SCORE_ADJ_MIN = -1000
OOM_SCORE_ADJ_OF_CHILDREN = 0


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

    def unprotect(self, pid: int, cgroup: Path | None) -> None:
        """Take the protection from a child that was just spawned, and from what it has forked.

        ``cgroup`` is where it was born, the first one there; nobody reaps the pid meanwhile. For a
        worker thread: blocks until the child is about to run its program's own instructions.

        Born without the protection it could be the agent's death. vfork(2) wakes the parent a
        little before the child stops sharing its memory, and whom the OOM killer picks then dies
        with all who share it. SIGSTOP works on the way out of the kernel, when that is over.
        """
        if self._own is None:
            return
        os.kill(pid, signal.SIGSTOP)
        # Or ended already, by whatever hand; whoever waits for that does so later.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            self._change(pid)
            if cgroup is not None:
                while self._change_others(cgroup, pid):
                    pass
        except OSError as error:
            log.warning("a command is never killed for memory: %s", cause_of(error))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _change_others(self, cgroup: Path, pid: int) -> bool:
        """What it has forked before it was stopped; whether there was any that had our value."""
        pids = (cgroup / "cgroup.procs").read_text(encoding="ascii").split()
        changed = [self._change(int(other)) for other in pids if int(other) not in (0, pid)]
        return any(changed)

    def _change(self, pid: int) -> bool:
        """Whether it had our value, and was not gone."""
        try:
            file = os.open(f"/proc/{pid}/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            # Who has another value has chosen it.
            if int(os.pread(file, 16, 0)) != self._own:
                return False
            os.pwrite(file, b"%d" % self._of_children, 0)
        except ProcessLookupError:
            return False
        finally:
            os.close(file)
        return True
