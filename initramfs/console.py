"""The machine's console: copied to where the person wants it, its end kept for error messages."""

import os
from collections import deque

import trio

_KEPT_LINES = 20
# What init says last before it ends the machine in order, see `init`.
_GOOD_ENDS = ("init: powering off", "init: restarting")


class Console:
    """What the machine wrote. `copy` is a descriptor that everything is written to."""

    def __init__(self, copy: int) -> None:
        self._copy = copy
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._partial = b""
        self._ended_well = False
        self.ended = trio.Event()

    async def follow(self, output: int) -> None:
        """Read until the machine has closed its end."""
        async with trio.lowlevel.FdStream(os.dup(output)) as stream:
            async for data in stream:
                self._write(data)
                *lines, self._partial = (self._partial + data).split(b"\n")
                for line in lines:
                    self._keep(line.decode(errors="replace").strip())
        self.ended.set()

    async def ends_well(self) -> bool:
        """Whether the machine powered itself off in order, once it has ended."""
        await self.ended.wait()
        return self._ended_well

    def last_lines(self) -> str:
        """The end of what was written, for an error message."""
        lines = [*self._lines, self._partial.decode(errors="replace")]
        return "\n".join(line for line in lines if line)

    def _keep(self, line: str) -> None:
        if line:
            self._lines.append(line)
        if line.endswith(_GOOD_ENDS):
            self._ended_well = True

    def _write(self, data: bytes | bytearray) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._copy, left) :]
