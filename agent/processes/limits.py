"""What workloads may take of the VM, so that neither the agent nor another command goes short.

Documentation/admin-guide/cgroup-v2.rst has the meaning of every file. Outside the image there are
mostly no controllers to limit with; then nothing is written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import attrs

from agent.errors import cause_of

log = logging.getLogger(__name__)

_MIB = 1 << 20

# What there is in every VM beside workloads: the kernel with the initramfs (65 MiB at rest), and
# the agent (45 MiB at rest, its files' pages included), with room to work.
_RESERVE_BYTES = 128 * _MIB
# What grows with the VM: its tables, and the memory that the kernel keeps free.
_RESERVE_SHARE = 16
_AGENT_BYTES = 64 * _MIB
# What one command leaves to the others: enough for a few small ones to go on, and to start.
_SPARED_BYTES = 8 * _MIB
_SPARED_SHARE = 16

# io without a limit: to be counted.
_CONTROLLERS = ("cpu", "io", "memory", "pids")
# Ten times that of all workloads. With 10,000 the agent answers no sooner, and a pull of it leaves
# the others a hundredth of the processor: docs/decisions/0008-one-limit-for-all-workloads.md.
_AGENT_CPU_WEIGHT = 1000
# No limit, in the kernel's words and in ours.
_MAX: Final = "max"


@attrs.frozen(kw_only=True)
class Limits:
    """Of all workloads together, of each command, and what is kept for the agent.

    None is no limit.
    """

    memory_bytes: int | None
    """Of all workloads: what their processes hold, the files that they read and write on a tmpfs
    or have cached, and what the kernel needs for them."""
    pids: int | None
    """Of all workloads: processes and threads, those included that nobody has waited for yet."""
    command_memory_bytes: int | None
    command_pids: int | None
    """Of one command or container, as the one above."""
    agent_memory_bytes: int
    """What the kernel takes from the agent for nobody else."""

    @classmethod
    def of_machine(cls, *, total_memory_bytes: int, threads_max: int, pid_max: int) -> Limits:
        """The defaults for a VM, by MemTotal and what the kernel made of it.

        Of the memory all but a reserve, so that workloads run into their own limit, where one of
        them is killed, and not into the VM's, where everything would wait for memory. Of the
        processes as many as fit into it: ``threads_max`` is a thread for every 130 KiB of the VM,
        which is what a forked shell takes. One command may have half of them, so that another can
        still fork, and nearly all of the memory: with all of it, the kernel would look for one to
        kill, and for memory to take away, among the others as well, and in making their cgroups.
        """
        reserve = _RESERVE_BYTES + total_memory_bytes // _RESERVE_SHARE
        # A VM that has hardly more than the reserve is no use without.
        memory_bytes = max(total_memory_bytes - reserve, total_memory_bytes // 4)
        pids = max(min(threads_max // 4, pid_max // 2), 2)
        return cls(
            memory_bytes=memory_bytes,
            pids=pids,
            command_memory_bytes=_nearly_all(memory_bytes),
            command_pids=_half(pids),
            agent_memory_bytes=min(_AGENT_BYTES, total_memory_bytes // 4),
        )

    @classmethod
    def inspect(
        cls,
        *,
        memory: int | Literal["max"] | None = None,
        pids: int | Literal["max"] | None = None,
        command_pids: int | Literal["max"] | None = None,
    ) -> Limits:
        """This machine's, but for what is given: bytes, or a number, or ``"max"`` for no limit.

        What one command may have is the same share of what is given for all.

        Raises:
            OSError: /proc is not there.
        """
        limits = cls.of_machine(
            total_memory_bytes=_total_memory_bytes(),
            threads_max=_number_in("/proc/sys/kernel/threads-max"),
            pid_max=_number_in("/proc/sys/kernel/pid_max"),
        )
        if memory is not None:
            all_memory = None if memory == _MAX else memory
            limits = attrs.evolve(
                limits, memory_bytes=all_memory, command_memory_bytes=_nearly_all(all_memory)
            )
        if pids is not None:
            all_pids = None if pids == _MAX else pids
            limits = attrs.evolve(limits, pids=all_pids, command_pids=_half(all_pids))
        if command_pids is not None:
            limits = attrs.evolve(
                limits, command_pids=None if command_pids == _MAX else command_pids
            )
        return limits

    def apply(self, workloads: Path) -> AppliedLimits:
        """Limit the cgroup of all workloads; what it returns limits one command each.

        The directories below ``workloads`` get the controllers as well, so that commands share
        the processors as equals, however many processes one of them has. What the kernel refuses
        is logged: commands then run without that limit.
        """
        try:
            there = (workloads / "cgroup.controllers").read_text(encoding="ascii").split()
            controllers = [name for name in _CONTROLLERS if name in there]
            if not controllers:
                log.debug("%s has no controllers: workloads have no limits", workloads)
                return AppliedLimits()
            below = " ".join(f"+{name}" for name in controllers)
            if "memory" in controllers:
                _write(workloads / "memory.max", _text(self.memory_bytes))
                _write_if_there(
                    workloads / "memory.swap.max", _MAX if self.memory_bytes is None else "0"
                )
            if "pids" in controllers:
                _write(workloads / "pids.max", _text(self.pids))
            for directory in (workloads, *filter(Path.is_dir, workloads.iterdir())):
                _write(directory / "cgroup.subtree_control", below)
        except OSError as error:
            log.warning("workloads are not limited: %s", cause_of(error))
            return AppliedLimits()
        log.info(
            "workloads: memory.max=%s pids.max=%s, each command: memory.max=%s pids.max=%s",
            _text(self.memory_bytes),
            _text(self.pids),
            _text(self.command_memory_bytes),
            _text(self.command_pids),
        )
        of_command = {"memory": self.command_memory_bytes, "pids": self.command_pids}
        return AppliedLimits(
            # A new cgroup has no limit of its own.
            [
                (f"{name}.max", limit)
                for name, limit in of_command.items()
                if name in controllers and limit is not None
            ],
            below,
        )

    def protect_agent(self, cgroup: Path) -> None:
        """Let the agent's own cgroup keep its memory, and run before all others.

        What the kernel refuses is logged.
        """
        try:
            _write_if_there(cgroup / "memory.min", str(self.agent_memory_bytes))
            _write_if_there(cgroup / "cpu.weight", str(_AGENT_CPU_WEIGHT))
        except OSError as error:
            log.warning("the agent is not protected from workloads: %s", cause_of(error))


@attrs.frozen
class AppliedLimits:
    """What is left to do for each command: nothing where there are no controllers."""

    _of_command: Sequence[tuple[str, int]] = ()
    _controllers: str | None = None

    def limit_command(self, cgroup: Path) -> None:
        """Limit one command's cgroup, before anything runs in it: a write for each limit.

        One in a container has its container's, unless ``open_container`` was called for that.

        Raises:
            OSError: the kernel refuses.
        """
        with suppress(FileNotFoundError):
            for file, limit in self._of_command:
                _write(cgroup / file, str(limit))

    def open_container(self, cgroup: Path) -> None:
        """Count and limit what will be in the cgroups below a container's, each by itself.

        Raises:
            OSError: it is gone, or has processes of its own.
        """
        if self._controllers is not None:
            _write(cgroup / "cgroup.subtree_control", self._controllers)


def _nearly_all(memory_bytes: int | None) -> int | None:
    if memory_bytes is None:
        return None
    spared = max(memory_bytes // _SPARED_SHARE, _SPARED_BYTES)
    return max(memory_bytes - spared, memory_bytes // 2)


def _half(pids: int | None) -> int | None:
    return None if pids is None else max(pids // 2, 1)


def _text(limit: int | None) -> str:
    return _MAX if limit is None else str(limit)


def _total_memory_bytes() -> int:
    # The sizes in /proc/meminfo are in KiB, whatever it says.
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemTotal:"))
    return int(kib) * 1024


def _number_in(path: str) -> int:
    return int(Path(path).read_text(encoding="ascii"))


def _write_if_there(path: Path, text: str) -> None:
    if path.exists():
        _write(path, text)


def _write(path: Path, text: str) -> None:
    # Nothing but three system calls: this is done for every command.
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, text.encode("ascii"))
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(file)
