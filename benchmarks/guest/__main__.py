"""Measure one row and print it: ROW IMAGE [--quick]"""

from __future__ import annotations

import sys

from benchmarks.guest.connection import UnexpectedAnswer
from benchmarks.guest.row import Setting
from benchmarks.guest.table import FILES, ROWS


def main() -> int:
    name, image, *options = sys.argv[1:]
    try:
        line = str({**ROWS, **FILES}[name](Setting(image=image, quick="--quick" in options)))
    except (UnexpectedAnswer, OSError, RuntimeError) as error:
        print(f"{name}: not measured: {error}", flush=True)
        return 1
    print(line, flush=True)
    return 0


sys.exit(main())
