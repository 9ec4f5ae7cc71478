"""How a command of the workload protocol ended, in that protocol's words."""

from __future__ import annotations

import signal

import attrs

from agent.processes.outcome import Outcome

_KILLED = 128 + signal.SIGKILL
# What a shell says of a command that it could not start.
_NOT_STARTED = 127
_LAST_SIGNAL = 64

EXITED = "exited"
STOPPED = "stopped"


@attrs.frozen
class End:
    """``code`` is a status, or 128+n after signal n; ``reason`` is one of docs/protocol.md's."""

    code: int
    reason: str

    @classmethod
    def of(cls, outcome: Outcome, *, stopped: bool, is_child: bool) -> End:
        """The end of a command whose process the agent has seen to.

        ``is_child``: the agent is the command's own parent, and knows a signal from a status.
        """
        if outcome.timed_out and not stopped:
            return cls(outcome.exit_code, "timeout")
        number = outcome.signal if is_child or outcome.signal else outcome.exit_code - 128
        return cls._of(outcome.exit_code, number or 0, oom=outcome.oom, stopped=stopped)

    @classmethod
    def kept(cls, code: int | None, *, oom: bool, stopped: bool) -> End:
        """The end of one that another agent has started, by the code that was kept.

        None stands for one that was killed together with all who could have kept it.
        """
        code = _KILLED if code is None else code
        return cls._of(code, code - 128, oom=oom, stopped=stopped)

    @classmethod
    def _of(cls, code: int, number: int, *, oom: bool, stopped: bool) -> End:
        if stopped:
            return cls(code, STOPPED)
        if oom and code:
            return cls(code, "oom")
        return cls(code, f"signaled: {name_of(number)}" if 0 < number <= _LAST_SIGNAL else EXITED)

    @classmethod
    def unstarted(cls, cause: str) -> End:
        """That of a command that never was."""
        return cls(_NOT_STARTED, f"failed to start: {cause}")


def name_of(number: int) -> str:
    """A signal's name: SIGKILL, SIGRTMIN+3."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number > signal.SIGRTMIN else str(number)
