"""What a power loss leaves of a VM's disk: its writes in their order, and its flushes.

A QEMU that is killed loses nothing that the VM has written: it is in this machine's page cache. So
the VM's disk is put on QEMU's blklogwrites driver, which logs every write, discard and flush in the
format of dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst of Linux), and what
a disk with a volatile cache would have kept is made from the log: all that was written before the
last flush, and of the rest some.
"""

import os
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from tests.support.commands import find_program, run

SECTOR = 512
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_MAGIC = 0x6A736677736872
_ENTRY = struct.Struct("<QQQQ")
_LOG_BYTES = 16 << 30  # sparse

_SCRIPT = """#!{python}
import os, sys
drive = "if=none,id=storage,format=raw,discard=unmap,file="
logged = (
    "if=none,id=storage,driver=blklogwrites,discard=unmap,log-super-update-interval=1,"
    "log.driver=file,log.filename={log},file.driver=file,file.discard=unmap,file.filename="
)
argv = [word.replace(drive, logged) for word in sys.argv]
assert argv != sys.argv, argv
os.execv({qemu!r}, argv)
"""


@frozen
class _Write:
    offset: int
    length: int
    flags: int
    data_at: int


class WriteLog:
    """The log of one boot, and the environment in which `booted` starts a QEMU that writes it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "writes.log"
        with self.path.open("wb") as file:
            file.truncate(_LOG_BYTES)
        programs = directory / "bin"
        programs.mkdir()
        qemu = Path(find_program("qemu-system-x86_64"))
        script = programs / qemu.name
        script.write_text(
            _SCRIPT.format(python=sys.executable, log=self.path, qemu=os.fspath(qemu))
        )
        script.chmod(0o755)
        self.env = {"PATH": f"{programs}:{os.environ['PATH']}"}

    def keep_after_power_loss(self, disk: Path, chances: random.Random) -> str:
        """Make `disk`, as it was before the boot, what the loss of power leaves; some figures."""
        entries = list(self._entries())
        durable = max((n for n, entry in enumerate(entries) if entry.flags & _FLUSH), default=0)
        kept = lost = 0
        with disk.open("r+b") as target, self.path.open("rb") as log:
            for number, entry in enumerate(entries):
                if number > durable and not entry.flags & _FUA:
                    # Of the last writes any may be lost, or be there in part.
                    fate = chances.choice(["lost", "kept", "torn"])
                    if fate == "lost" or not entry.length:
                        lost += 1
                        continue
                    length = entry.length
                    if fate == "torn":
                        length = SECTOR * chances.randrange(entry.length // SECTOR)
                    kept += 1
                else:
                    length = entry.length
                target.seek(entry.offset)
                if entry.flags & _DISCARD:
                    _write_zeros(target.fileno(), entry.offset, length)
                else:
                    log.seek(entry.data_at)
                    target.write(log.read(length))
        return f"{len(entries)} writes and flushes, after the last flush {kept} kept, {lost} lost"

    def _entries(self) -> Iterator[_Write]:
        with self.path.open("rb") as log:
            magic, _, _, sector = struct.unpack("<QQQI", log.read(28))
            assert (magic, sector) == (_MAGIC, SECTOR)
            position = SECTOR
            while True:
                log.seek(position)
                first, count, flags, _ = _ENTRY.unpack(log.read(_ENTRY.size))
                if not (count or flags):
                    return  # never written
                position += SECTOR
                yield _Write(first * SECTOR, count * SECTOR, flags, position)
                if not flags & _DISCARD:
                    position += count * SECTOR


def copy_disk(disk: Path, copy: Path) -> None:
    """The same disk once more, holes included."""
    run("cp", "--sparse=always", disk, copy)


def _write_zeros(fd: int, offset: int, length: int) -> None:
    block = bytes(min(length, 1 << 20))
    while length:
        written = os.pwrite(fd, block[:length], offset)
        offset += written
        length -= written
