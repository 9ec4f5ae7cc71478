"""Whether what is mounted answers: the storage, and the host's shares."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import trio

from agent.errors import cause_of
from agent.linux.programs import path_of
from protocol.values import MountCheck

MOUNTINFO = Path("/proc/self/mountinfo")
LIMIT_S = 5.0
_ESCAPED = {r"\040": " ", r"\011": "\t", r"\012": "\n", r"\134": "\\"}


def shares(mountinfo: Iterable[str]) -> list[str]:
    """Where virtiofs shares are mounted, one place each, by proc_pid_mountinfo(5)'s lines."""
    found: dict[str, str] = {}
    for line in mountinfo:
        fields = line.split()
        if fields[fields.index("-", 6) + 1] == "virtiofs":
            # Bound elsewhere it is the same device.
            found.setdefault(fields[2], fields[4])
    return [_unescaped(path) for path in found.values()]


def _unescaped(path: str) -> str:
    for code, character in _ESCAPED.items():
        path = path.replace(code, character)
    return path


async def check(storage: Path, shared: Iterable[str], limit_s: float = LIMIT_S) -> MountCheck:
    """Write to the storage, and ask each share how full it is, all at once."""
    checked: list[str] = []
    problems: list[str] = []

    async def see(path: str, look: partial[None]) -> None:
        checked.append(path)
        problem = f"no answer within {limit_s:g} s"
        with trio.move_on_after(limit_s):
            try:
                await trio.to_thread.run_sync(look, abandon_on_cancel=True)
                return
            except (OSError, subprocess.SubprocessError) as error:
                problem = cause_of(error)
        problems.append(f"{path}: {problem}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(see, str(storage), partial(_write, storage))
        for path in shared:
            nursery.start_soon(see, path, partial(_ask, path))
    error = "; ".join(sorted(problems)) or None
    return MountCheck(ok=error is None, checked=tuple(sorted(checked)), error=error)


def _write(directory: Path) -> None:
    # Without a name, so that nothing of it can be left.
    descriptor = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, b"resumed\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ask(path: str) -> None:
    """statfs(2), in a process of its own: a share whose host is gone keeps who asks, and an agent
    with such a thread could not even end. This one merely waits for the process."""
    subprocess.run(
        ["stat", "-f", path],
        executable=path_of("stat"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
    )
