"""Run all benchmarks, or those that are named, or single rows of one:

python -m benchmarks [--quick] [startup] [boot] [idle] [processes] [files] [pulls] [store] [trees]
                     [pulls:ROW]...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import boot, files, idle, processes, pulls, startup, store, trees

ROOTFS = Path("build/rootfs")
WHOLE = {"startup": startup.measure, "boot": boot.measure, "idle": idle.measure}
BY_ROWS = {
    "processes": (processes.measure, tuple(processes.ROWS)),
    "files": (files.measure, tuple(files.ROWS)),
    "pulls": (pulls.measure, tuple(pulls.ROWS)),
    "store": (store.measure, tuple(store.ROWS)),
    "trees": (trees.measure, tuple(trees.ROWS)),
}
QUICK = "--quick"


def known_names() -> Iterator[str]:
    """All that may be named on the command line."""
    yield from WHOLE
    for name, (_, rows) in BY_ROWS.items():
        yield name
        yield from (f"{name}:{row}" for row in rows)


def measure(name: str, rows: Sequence[str], *, quick: bool) -> None:
    """Run one benchmark, or ``rows`` of it; ``quick`` makes no difference to all."""
    print(f"--- {name}", flush=True)
    if name in WHOLE:
        WHOLE[name](ROOTFS)
    else:
        BY_ROWS[name][0](ROOTFS, rows, quick=quick)


def main() -> int:
    words = [word for word in sys.argv[1:] if word != QUICK]
    known = list(known_names())
    unknown = [word for word in words if word not in known]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
        return 2
    chosen: dict[str, list[str]] = {}
    for word in words or [*WHOLE, *BY_ROWS]:
        name, _, row = word.partition(":")
        chosen.setdefault(name, []).append(row)
    try:
        for name, rows in chosen.items():
            # Named without a row, all of it is meant, whatever else is named.
            measure(name, [] if "" in rows else rows, quick=QUICK in sys.argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
