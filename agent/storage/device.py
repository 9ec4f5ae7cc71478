"""A block device, or a file that stands for one: what is on it, and whether that is anything."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from agent.errors import AgentError, failing_as
from agent.linux.blkroget import blkroget
from agent.linux.programs import path_of
from protocol.errors import ErrorCode

MIB = 1024 * 1024
PROBE_LIMIT_S = 120

# blkid(8), EXIT STATUS.
_NOTHING_FOUND, _AMBIVALENT = 2, 8


def signature(device: str) -> str | None:
    """What blkid(8) sees on the device ("ext4", "dos"), or None where it sees nothing.

    Raises:
        AgentError: MOUNT_FAILED; the device cannot be probed.
    """
    with failing_as(ErrorCode.MOUNT_FAILED, f"probe {device}"):
        # It says of a missing device, and of one that nobody can read, that nothing is on it.
        os.close(os.open(device, os.O_RDONLY | os.O_CLOEXEC))
        probe = subprocess.run(
            ["blkid", "-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE", device],
            executable=path_of("blkid"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_LIMIT_S,
        )
        if probe.returncode == _NOTHING_FOUND:
            return None
        if probe.returncode == _AMBIVALENT:
            return "signatures of several file systems at once"
        probe.check_returncode()
    found = probe.stdout.decode(errors="replace").split()
    return found[0] if found else "a signature of no known type"


def refuse_unless_blank(device: str) -> None:
    """blkid does not know everything: only a device whose ends are zero counts as empty.

    Raises:
        AgentError: FORMAT_FAILED; there is something in its first or last MiB.
    """
    with failing_as(ErrorCode.FORMAT_FAILED, f"read {device}"), Path(device).open("rb") as disk:
        for offset, whence in ((0, os.SEEK_SET), (-MIB, os.SEEK_END)):
            try:
                disk.seek(offset, whence)
            except OSError:
                disk.seek(0)
            if any(disk.read(MIB)):
                raise AgentError(
                    ErrorCode.FORMAT_FAILED,
                    f"format {device}: it holds data of no known file system; "
                    "zero its first and last MiB if it is to be storage",
                )


def size_of(device: str) -> int:
    """Its size in bytes. Raises OSError."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def is_read_only(device: str) -> bool:
    """Whether the device takes no writes at all, whoever asks. Raises OSError."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return blkroget(descriptor)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        return False  # a plain file
    finally:
        os.close(descriptor)
