"""What runs below a process, as /proc tells it (proc(5))."""

from collections.abc import Iterator
from pathlib import Path


def children(pid: int) -> list[int]:
    """The children of all threads of `pid`; none when it has ended."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread, or all of them, ended meanwhile
    return found


def descendants(pid: int) -> Iterator[int]:
    """Children, their children, and so on; orphans are below whoever adopted them."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def arguments(pid: int) -> list[bytes]:
    """Its command line; empty when it has ended or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_running(pid: int) -> bool:
    """Whether it has not ended; one that only waits for being reaped has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def innermost_pid(pid: int) -> int | None:
    """Its number in the pid namespace that it lives in; None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    (numbers,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
    return int(numbers.split()[-1])
