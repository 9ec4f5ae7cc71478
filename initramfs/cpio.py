"""A cpio archive in the kernel's `newc` form, the same bytes for the same tree."""

import os
import stat
from pathlib import Path
from typing import IO

# The console exists before /dev is mounted, so that init's first words are seen.
CONSOLE = ("dev/console", stat.S_IFCHR | 0o600, (5, 1))


def write_cpio(root: Path, file: IO[bytes], epoch: int) -> None:
    """Archive a tree of directories, files and links, all owned by root and of one time.

    Described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
    """
    paths = sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix())
    for number, path in enumerate(paths, start=1):
        status = path.lstat()
        if path.is_symlink():
            contents = os.fsencode(path.readlink())
        else:
            contents = path.read_bytes() if path.is_file() else b""
        name = path.relative_to(root).as_posix()
        _write_entry(file, number, name, status.st_mode, epoch, contents)
    name, mode, device = CONSOLE
    _write_entry(file, len(paths) + 1, name, mode, epoch, b"", device)
    _write_entry(file, 0, "TRAILER!!!", 0, 0, b"")


def _write_entry(
    file: IO[bytes],
    number: int,
    name: str,
    mode: int,
    epoch: int,
    contents: bytes,
    device: tuple[int, int] = (0, 0),
) -> None:
    encoded = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, epoch, len(contents), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    file.write(header + encoded + bytes(-(len(header) + len(encoded)) % 4))
    file.write(contents + bytes(-len(contents) % 4))
