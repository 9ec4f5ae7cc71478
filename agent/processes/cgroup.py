"""cgroup2 directories: one for each command, so that whatever it starts can be found and ended."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import trio

from agent.errors import cause_of
from agent.kernel_files import content, counted
from agent.linux.bpf import attach_device_filter, load_device_filter
from agent.processes.device_filter import (
    DEFAULT_DEVICES,
    WHOLE_MACHINE_DEVICES,
    DeviceRule,
    device_program,
)

log = logging.getLogger(__name__)

# An extended attribute of a cgroup's directory: it goes when the cgroup does.
_KEPT = "trusted.innkeep.kept"
_PID = "trusted.innkeep.pid"


@attrs.frozen
class Counters:
    """What the kernel has counted of a cgroup; None for what it does not count here."""

    cpu_us: int | None
    peak_memory_bytes: int | None
    oom_kills: int | None


@attrs.frozen
class Cgroup:
    """One directory of cgroup2 (Documentation/admin-guide/cgroup-v2.rst) and all below it."""

    path: Path

    @classmethod
    def all_in(cls, parent: Path) -> list[Cgroup]:
        """Those that are in ``parent`` now, whoever made them."""
        # What tells a directory without asking for each of the kernel's files beside it.
        with os.scandir(parent) as entries:
            return [cls(parent / entry.name) for entry in entries if entry.is_dir()]

    @classmethod
    def make(cls, parent: Path, name: str | None = None) -> Cgroup:
        """A new one; without a name with one that it does not share with another agent's either.

        Raises:
            OSError: the parent is gone or takes no more, or has one of that name.
        """
        cgroup = cls(parent / (name or os.urandom(8).hex()))
        os.mkdir(cgroup.path)  # noqa: PTH102 for every command, and pathlib's costs 10 µs more
        return cgroup

    def keep(self, until: float | None = None) -> None:
        """Mark it: what runs in it outlives the request that started it, and the agent's crash.

        ``until`` is the time on CLOCK_BOOTTIME at which it is to be ended all the same.

        Raises:
            OSError: it is gone.
        """
        os.setxattr(self.path, _KEPT, b"" if until is None else b"%f" % until)

    def is_kept(self) -> bool:
        """Whether it is marked; an earlier agent may have done that."""
        return self._mark() is not None

    def kept_until(self) -> float | None:
        """The time on CLOCK_BOOTTIME that it was marked with, if any."""
        mark = self._mark()
        return float(mark) if mark else None

    def tell_pid(self, pid: int) -> None:
        """Have it known by ``pid``, which a host was told. Raises OSError: it is gone."""
        os.setxattr(self.path, _PID, b"%d" % pid)

    def told_pid(self) -> int | None:
        """The pid that it is known by, if any; an earlier agent may have told it."""
        pid = self._attribute(_PID)
        return int(pid) if pid else None

    def _mark(self) -> bytes | None:
        return self._attribute(_KEPT)

    def _attribute(self, name: str) -> bytes | None:
        try:
            return os.getxattr(self.path, name)
        except OSError:
            return None

    def pids(self) -> list[int]:
        """The processes that are in it and below it now; none if it is gone."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.path):
            try:
                members = _read(Path(directory, "cgroup.procs")).split()
            except OSError as error:
                # Removed meanwhile, or threaded, and then its processes are told further up.
                if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                    raise
                continue
            # 0 stands for a process of a pid namespace above; to kill(2) it would mean ourselves.
            found += filter(None, map(int, members))
        return found

    def members(self) -> list[int]:
        """Those that are in it now, and not below it. Raises OSError: it is gone."""
        return [int(pid) for pid in _read(self.path / "cgroup.procs").split() if pid != "0"]

    def is_populated(self) -> bool:
        """Whether a process, even one that only waits for being reaped, is in it or below."""
        try:
            return "populated 1" in _read(self.path / "cgroup.events")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return False

    def counters(self) -> Counters:
        """What has been counted so far (Documentation/admin-guide/cgroup-v2.rst)."""
        directory = str(self.path)
        cpu_us = counted(content(f"{directory}/cpu.stat"), b"usage_usec")
        peak = content(f"{directory}/memory.peak")
        if not peak:
            # No memory controller: nobody counts its events either.
            return Counters(cpu_us, None, None)
        events = content(f"{directory}/memory.events")
        return Counters(cpu_us, int(peak), counted(events, b"oom_kill"))

    def kill(self) -> None:
        """SIGKILL to every process in it, those being born included. Nothing if it is gone."""
        try:
            _write(self.path / "cgroup.kill", "1")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    @contextmanager
    def frozen(self, patience_s: float) -> Iterator[None]:
        """Have nothing run in it and below for the block: nor is anything being forked there.

        Blocks until that is so, for ``patience_s`` at most: what is stuck in the kernel goes on
        when it comes back from there. Killed it can be all the while. Raises OSError: it is gone.
        """
        switch = self.path / "cgroup.freeze"
        _write(switch, "1")
        try:
            self._wait_frozen(time.monotonic() + patience_s)
            yield
        finally:
            _write(switch, "0")

    def _wait_frozen(self, deadline: float) -> None:
        with (self.path / "cgroup.events").open("rb", buffering=0) as events:
            changes = select.poll()
            changes.register(events, select.POLLPRI)
            while b"frozen 0" in os.pread(events.fileno(), 4096, 0):
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not changes.poll(left_s * 1000):
                    break

    def terminate(self) -> None:
        """SIGTERM to every process that is in it now."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def remove(self) -> bool:
        """Take the directory away if no process is left in it; whether it is away now."""
        if _remove(self.path):
            return True
        if self.is_populated():
            # What is empty in it may be a container's own, and about to be used.
            return False
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

        workloads/commands/<id>              a command in the VM
        workloads/containers/<id>            crun and the container of one command, or
        workloads/containers/<id>/first      a container that stays: its first process, and
        workloads/containers/<id>/<id>       each command that joined it
        workloads/privileged/<id>…           the same for whole-machine containers

    Devices are filtered at ``containers`` and ``privileged``. The agent itself is elsewhere.
    Whoever opens a tree closes it.
    """

    workloads: Cgroup
    commands: Path
    containers: Path
    privileged: Path

    @classmethod
    def open(cls, root: Path) -> CgroupTree:
        """Make what is missing: ``root``, and the directories below it.

        Raises:
            OSError: no cgroup2 there, or not writable.
        """
        if not any((path / "cgroup.procs").exists() for path in (root, root.parent)):
            raise OSError(errno.ENOENT, "no cgroup2 hierarchy", str(root))
        workloads = root / "workloads"
        names = ("commands", "containers", "privileged")
        tree = cls(Cgroup(workloads), *(workloads / name for name in names))
        for name in names:
            (workloads / name).mkdir(parents=True, exist_ok=True)
        try:
            _filter_devices(tree.containers, DEFAULT_DEVICES)
            _filter_devices(tree.privileged, WHOLE_MACHINE_DEVICES)
        except OSError as error:
            log.warning("containers can use every device: %s", cause_of(error))
        return tree

    def all(self) -> list[Cgroup]:
        """Those of all commands and containers, but not those within a container that stays."""
        parents = (self.commands, self.containers, self.privileged)
        return [cgroup for parent in parents for cgroup in Cgroup.all_in(parent)]

    def is_container(self, cgroup: Cgroup) -> bool:
        """Whether one of ``all`` is a container's."""
        return cgroup.path.parent != self.commands

    def close(self) -> None:
        """Remove the directories that nothing runs in; ``root`` belongs to who gave it."""
        self.workloads.remove()


def _remove(path: Path) -> bool:
    try:
        os.rmdir(path)  # noqa: PTH106 for every command
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True


def _filter_devices(path: Path, devices: Sequence[DeviceRule]) -> None:
    program = load_device_filter(device_program(devices))
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
