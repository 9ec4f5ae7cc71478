"""cgroup2 directories: one for each command, so that whatever it starts can be found and ended."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import select
import signal
from contextlib import suppress
from pathlib import Path

import attrs
import trio

from agent.errors import cause_of
from agent.linux.bpf import attach_device_filter, load_device_filter
from agent.processes.device_filter import DEFAULT_DEVICES, device_program

log = logging.getLogger(__name__)


@attrs.frozen
class Cgroup:
    """One directory of cgroup2 (Documentation/admin-guide/cgroup-v2.rst) and all below it."""

    path: Path

    @classmethod
    def all_in(cls, parent: Path) -> list[Cgroup]:
        """Those that are in ``parent`` now, whoever made them."""
        return [cls(path) for path in parent.iterdir() if path.is_dir()]

    @classmethod
    def make(cls, parent: Path) -> Cgroup:
        """A new one with a name of its own, which it does not share with another agent's either.

        Raises:
            OSError: the parent is gone or takes no more.
        """
        cgroup = cls(parent / secrets.token_hex(8))
        cgroup.path.mkdir()
        return cgroup

    def kill(self) -> None:
        """SIGKILL to every process in it, those being born included. Nothing if it is gone."""
        with suppress(FileNotFoundError):
            _write(self.path / "cgroup.kill", "1")

    def terminate(self) -> None:
        """SIGTERM to every process that is in it now."""
        for directory, _, _ in os.walk(self.path):
            try:
                members = _read(Path(directory, "cgroup.procs")).split()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
                continue  # removed meanwhile
            # 0 stands for a process of a pid namespace above; to kill(2) it would mean ourselves.
            for pid in filter(None, map(int, members)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def remove(self) -> bool:
        """Take the directory away if no process is left in it; whether it is away now."""
        if _remove(self.path):
            return True
        # A container may have made cgroups of its own, which are in the way even when empty.
        for directory, _, _ in os.walk(self.path, topdown=False):
            _remove(Path(directory))
        return not self.path.exists()

    async def emptied(self) -> None:
        """Return when no process is left in it or below."""
        await trio.lowlevel.checkpoint()
        try:
            with (
                (self.path / "cgroup.events").open("rb", buffering=0) as events,
                select.epoll(1) as changes,
            ):
                # EPOLLPRI is up whenever the file differs from what was read of it last.
                changes.register(events, select.EPOLLPRI)
                while b"populated 1" in os.pread(events.fileno(), 4096, 0):
                    await trio.lowlevel.wait_readable(changes.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    async def removed(self) -> None:
        """Take the directory away as soon as no process is left in it."""
        while not self.remove():
            await self.emptied()


@attrs.frozen
class CgroupTree:
    """Where commands have their cgroups: below ``workloads`` in a directory of cgroup2.

        workloads/commands/<id>     a command in the VM
        workloads/containers/<id>   crun and its container; devices are filtered here

    The agent itself is elsewhere. Whoever opens a tree closes it.
    """

    workloads: Cgroup
    commands: Path
    containers: Path

    @classmethod
    def open(cls, root: Path) -> CgroupTree:
        """Make what is missing: ``root``, and the directories below it.

        Raises:
            OSError: no cgroup2 there, or not writable.
        """
        if not any((path / "cgroup.procs").exists() for path in (root, root.parent)):
            raise OSError(errno.ENOENT, "no cgroup2 hierarchy", str(root))
        workloads = root / "workloads"
        tree = cls(Cgroup(workloads), workloads / "commands", workloads / "containers")
        for directory in (tree.commands, tree.containers):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            _filter_devices(tree.containers)
        except OSError as error:
            log.warning("containers can use every device: %s", cause_of(error))
        return tree

    def close(self) -> None:
        """Remove the directories that nothing runs in; ``root`` belongs to who gave it."""
        self.workloads.remove()


def _remove(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True


def _filter_devices(path: Path) -> None:
    program = load_device_filter(device_program(DEFAULT_DEVICES))
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            attach_device_filter(directory, program)
        finally:
            os.close(directory)
    finally:
        os.close(program)


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii")


def _write(path: Path, text: str) -> None:
    # No buffering: an error must come from this write, not from a later close.
    with path.open("wb", buffering=0) as file:
        file.write(text.encode("ascii"))
