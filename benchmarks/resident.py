"""What a process and its children have resident while something happens, see proc(5)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SAMPLE_S = 0.02
_RESET_PEAK = "5"


class Watch:
    """Of one process: the most that it had, exactly; of its children by samples."""

    def __init__(self, pid: int) -> None:
        self._process = Path(f"/proc/{pid}")
        self._ended = threading.Event()
        self.peak_mb = 0.0
        self.children_mb = 0.0
        """The most that all children together had."""
        self.most_children = 0

    def resident_mb(self) -> float:
        """Now."""
        return _status_mb(self._process, "VmRSS")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch for the time of the block."""
        (self._process / "clear_refs").write_text(_RESET_PEAK)
        sampler = threading.Thread(target=self._sample)
        sampler.start()
        try:
            yield
        finally:
            self._ended.set()
            sampler.join()
            self.peak_mb = _status_mb(self._process, "VmHWM")

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            pids: list[str] = []
            for task in self._process.glob("task/*/children"):
                with suppress(OSError):
                    pids += task.read_text().split()
            together = 0.0
            for pid in pids:
                with suppress(OSError, LookupError):
                    together += _status_mb(Path("/proc") / pid, "VmRSS")
            self.children_mb = max(self.children_mb, together)
            self.most_children = max(self.most_children, len(pids))


def _status_mb(process: Path, field: str) -> float:
    for line in (process / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(field)  # a zombie has none
