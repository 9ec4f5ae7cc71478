"""The workload's ports in a process that kills itself at a chosen line of the agent's own code.

    python -m tests.support.mortal_agent DIRECTORY CGROUP LINE [COMMAND ...]

It serves in `DIRECTORY`, with its commands' cgroups in `CGROUP`, and the words as the boot's
workload. When that, or what a host asks for, is being started, lines are counted; at the one of
that number it dies by SIGKILL. After the start it says how many there were.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import trio
from attrs import define

import agent
from agent.workload.supervisor import Supervisor
from tests.support.workload import served

_AGENT = str(Path(agent.__file__).parent)


@define
class _Lines:
    deadly: int
    count: int = 0

    def watch(self, frame: FrameType, event: str, _: Any) -> Any:
        """A trace function (sys.settrace) that counts in the agent's files."""
        if not frame.f_code.co_filename.startswith(_AGENT):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.watch


async def _serve(directory: Path, cgroup_root: Path, lines: _Lines, words: tuple[str, ...]) -> None:
    command = {"command": words} if words else {}
    begin = Supervisor._begin

    def watched(self: Supervisor, *arguments: Any, **options: Any) -> Any:
        threading.settrace(lines.watch)
        sys.settrace(lines.watch)
        run = begin(self, *arguments, **options)
        trio.lowlevel.spawn_system_task(tell, run.decided)
        return run

    async def tell(started: trio.Event) -> None:
        await started.wait()
        sys.settrace(None)
        print(lines.count, flush=True)

    # Not a fake: the same, seen.
    Supervisor._begin = watched  # type: ignore[method-assign]
    async with served(directory, cgroup_root, **command):
        print("serving", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    _directory, _cgroup_root, _line, *_words = sys.argv[1:]
    trio.run(_serve, Path(_directory), Path(_cgroup_root), _Lines(int(_line)), tuple(_words))
