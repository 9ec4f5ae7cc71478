"""Run all benchmarks, or those that are named: python -m benchmarks [startup] [boot]"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import boot, startup

ROOTFS = Path("build/rootfs")
BENCHMARKS = {"startup": startup.measure, "boot": boot.measure}


def main() -> int:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
        return 2
    for name in names:
        print(f"--- {name}")
        BENCHMARKS[name](ROOTFS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
