"""What a process asks of the kernel while something happens, as strace(1) has seen it."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import define, frozen

from tests.support.commands import find_program

_CALL = re.compile(r"(\d+) +(\w+)\((.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
_RESULT = re.compile(r"(.*)\) += (-?\d+|\?)")


@frozen
class Call:
    """A system call with its arguments as strace writes them.

    `begun` and `ended` are moments of one clock for all calls, `ended` None for one that never did.
    """

    name: str
    arguments: str
    begun: int
    ended: int | None
    succeeded: bool


@define
class Trace:
    calls: list[Call]


@contextmanager
def traced(pid: int, names: str, log: Path) -> Iterator[Trace]:
    """Follow a process, its threads and its children for the block; then the trace has its calls.

    Descriptors are written with their paths (`3</some/file>`).
    """
    trace = Trace([])
    argv = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={names}", "-e", "signal=none"]
    find_program("strace")
    with subprocess.Popen(
        [*argv, "-o", str(log), "-p", str(pid)], stderr=subprocess.PIPE, text=True
    ) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        assert "attached" in said, said
        try:
            yield trace
        finally:
            strace.terminate()
            strace.stderr.read()
    trace.calls = _parse(log.read_text(errors="surrogateescape"))


def _parse(text: str) -> list[Call]:
    calls: list[Call] = []
    unfinished: dict[str, tuple[str, str, int]] = {}
    for moment, line in enumerate(text.splitlines()):
        if resumed := _RESUMED.match(line):
            thread, _, rest = resumed.groups()
            name, start, begun = unfinished.pop(thread)
            calls.append(_call(name, start + rest, begun, moment))
        elif call := _CALL.match(line):
            thread, name, rest = call.groups()
            if rest.endswith("<unfinished ...>"):
                unfinished[thread] = (name, rest.removesuffix("<unfinished ...>"), moment)
            else:
                calls.append(_call(name, rest, moment, moment))
    return calls + [Call(*left, None, False) for left in unfinished.values()]


def _call(name: str, rest: str, begun: int, ended: int) -> Call:
    found = _RESULT.match(rest)
    arguments, result = found.groups() if found else (rest, "?")
    return Call(name, arguments, begun, ended, result.isdigit())
