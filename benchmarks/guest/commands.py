"""The rows of commands in the VM, against starting them oneself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

from benchmarks.guest.connection import Connection, frame
from benchmarks.guest.row import Ratio, Setting, interleaved, median_duration
from protocol import requests

TRUE = "/bin/true"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
PLAIN = frame(requests.VmExec(command=("true",)))
INTERACTIVE = frame(requests.VmExec(command=("true",), interactive=True))
REST_S = 0.2


def plain(setting: Setting) -> Ratio:
    """A plain command, one after the other."""
    return _at_once("vm_exec true, plain, p50", setting, lambda host: host.complete(PLAIN))


def interactive(setting: Setting) -> Ratio:
    """An interactive command, one after the other."""
    name = "vm_exec true, interactive, p50"
    return _at_once(name, setting, lambda host: host.attend(INTERACTIVE))


def spaced_plain(setting: Setting) -> Ratio:
    """A plain command after some rest."""
    return _spaced("  plain, one every 200 ms", setting, lambda host: host.complete(PLAIN))


def spaced_interactive(setting: Setting) -> Ratio:
    """An interactive command after some rest."""
    name = "  interactive, one every 200 ms"
    return _spaced(name, setting, lambda host: host.attend(INTERACTIVE))


def spawn(*argv: str) -> None:
    """Run a program to its end, which must be success: the reference."""
    pid = os.posix_spawnp(argv[0], argv, ENVIRONMENT)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(argv)}: status {os.waitstatus_to_exitcode(status)}")


def _at_once(name: str, setting: Setting, run: Callable[[Connection], None]) -> Ratio:
    commands = setting.count(full=25, quick=5)
    with Connection() as host:
        sides = (partial(run, host), partial(spawn, TRUE))
        for side in sides:
            median_duration(commands, side)
        ours, theirs = interleaved(
            setting.count(full=40, quick=4),
            *(partial(median_duration, commands, side) for side in sides),
        )
    return _row(name, ours, theirs, limit=3)


def _spaced(name: str, setting: Setting, run: Callable[[Connection], None]) -> Ratio:
    with Connection() as host:

        def after_rest(action: Callable[[], None]) -> float:
            time.sleep(REST_S)
            return median_duration(1, action)

        ours, theirs = interleaved(
            setting.count(full=75, quick=5),
            partial(after_rest, partial(run, host)),
            partial(after_rest, partial(spawn, TRUE)),
        )
    return _row(name, ours, theirs, limit=3.5)


def _row(name: str, ours: float, theirs: float, *, limit: float) -> Ratio:
    return Ratio(
        name=name,
        ours=ours * 1e3,
        reference=theirs * 1e3,
        against="posix_spawn and wait",
        unit="ms",
        limit=limit,
    )
