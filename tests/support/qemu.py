"""The QEMU of a booted VM: with more hardware than `initramfs.boot` gives it, and told what to do.

Its monitor is QMP's, one JSON object a line (qemu-qmp-ref(7)).
"""

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.support.commands import find_program

_SCRIPT = """#!{python}
import os, sys
os.execv({qemu!r}, [*sys.argv, *{options!r}])
"""


class Qemu:
    """What `booted` starts in the environment `env`: QEMU with `options` and a monitor."""

    def __init__(self, directory: Path, *options: str) -> None:
        programs = directory / "qemu"
        programs.mkdir(parents=True)
        self._monitor = programs / "monitor"
        program = Path(find_program("qemu-system-x86_64"))
        monitor = ("-qmp", f"unix:{self._monitor},server=on,wait=off")
        script = programs / program.name
        script.write_text(
            _SCRIPT.format(
                python=sys.executable, qemu=os.fspath(program), options=[*options, *monitor]
            )
        )
        script.chmod(0o755)
        self.env = {"PATH": f"{programs}:{os.environ['PATH']}"}

    def monitor(self) -> "AbstractAsyncContextManager[Monitor]":
        """Its monitor, which serves one at a time."""
        return monitor(self._monitor)


class Monitor:
    """A conversation with QEMU."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Have a command carried out; what it returns."""
        message = {"execute": command, "arguments": arguments}
        await self._stream.send_all(json.dumps(message).encode() + b"\n")
        return (await self.receive("return"))["return"]

    async def receive(self, *keys: str) -> Any:
        """The next message with these keys; others are passed over, errors fail."""
        while True:
            message = json.loads(await self._line())
            assert "error" not in message, message
            if all(key in message for key in keys):
                return message

    async def _line(self) -> bytes:
        while b"\n" not in self._received:
            data = await self._stream.receive_some()
            assert data, "QEMU has ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line


@asynccontextmanager
async def monitor(path: Path) -> AsyncIterator[Monitor]:
    """The monitor that a QEMU has at a unix socket."""
    async with await trio.open_unix_socket(path) as stream:
        qmp = Monitor(stream)
        await qmp.receive("QMP")
        await qmp.ask("qmp_capabilities")
        yield qmp
