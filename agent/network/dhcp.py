"""busybox's udhcpc: a process beside the agent that keeps the VM's lease, and outlives it.

It tells of what it gets through dhcp_event.sh, which keeps that in a file and rings a bell in a
FIFO; so an agent that comes back finds both the client and its lease where they were.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import trio

from agent.errors import cause_of
from agent.linux.spawn import posix_spawn
from agent.network.lease import Lease, read_lease

log = logging.getLogger(__name__)

BUSYBOX = "/bin/busybox"
_EVENT = Path(__file__).with_name("dhcp_event.sh")
# Five attempts a second apart, and again after five more.
_PATIENCE = ("-t", "5", "-T", "1", "-A", "5")
_OPTIONS = ("staticroutes", "search", "mtu")
# A client that ends by itself was killed, or cannot work here: it is started again after a second,
# and less and less often where that does not help.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 60.0
# To let its lease go takes a datagram.
_FAREWELL_S = 0.5


@attrs.define(eq=False, kw_only=True)
class Client:
    """How udhcpc is run, for the VM's one interface: its files are in ``directory``."""

    hostname: str
    directory: Path
    cgroup: Path | None = None
    """Where it outlives the agent."""
    busybox: str = BUSYBOX
    _ending: bool = False

    @property
    def lease_file(self) -> Path:
        return self.directory / "lease"

    def lease(self) -> Lease | None:
        """What it has now. Raises ValueError: the server's answer is none; OSError."""
        return read_lease(self.lease_file)

    def lost(self) -> Lease | None:
        """What it had last and has no longer, which an agent that was not there may not know."""
        with suppress(ValueError, OSError):
            return read_lease(self.lease_file.with_name(f"{self.lease_file.name}.lost"))
        return None

    @contextmanager
    def bell(self) -> Iterator[int]:
        """A descriptor that is readable once the lease may be another, for the block.

        Raises:
            OSError: it cannot be made.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkfifo(self._bell_file, 0o600)
        # Both ways: it never comes to its end.
        fifo = os.open(self._bell_file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            yield fifo
        finally:
            os.close(fifo)

    async def keep_running(self, interface: str) -> None:
        """Have one running: that of the agent before this one, or a new one, until ``end``."""
        pause_s = _FIRST_PAUSE_S
        while True:
            pidfd = self._running()
            try:
                if pidfd is None:
                    pidfd = self._start(interface)
                begun_s = trio.current_time()
                await trio.lowlevel.wait_readable(pidfd)
                # Ours has to be reaped, and one that was another agent's is init's.
                with suppress(ChildProcessError):
                    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222
            except OSError as error:
                begun_s = trio.current_time()
                log.error("dhcp: start udhcpc: %s", cause_of(error))
            finally:
                if pidfd is not None:
                    os.close(pidfd)
            if self._ending:
                return
            if trio.current_time() - begun_s > _LAST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            log.error("dhcp: udhcpc ended, and is started again after %.0f s", pause_s)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def renew(self) -> None:
        """Have the server asked now, rather than when half of the lease is over."""
        pidfd = self._running()
        if pidfd is None:
            return
        try:
            with suppress(ProcessLookupError):
                # udhcpc's own meaning of it.
                signal.pidfd_send_signal(pidfd, signal.SIGUSR1)
        finally:
            os.close(pidfd)

    async def end(self) -> None:
        """Let the lease go, and the client end, if there is one: the VM is about to."""
        self._ending = True
        pidfd = self._running()
        if pidfd is None:
            return
        try:
            with trio.move_on_after(_FAREWELL_S), suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def _running(self) -> int | None:
        """The pidfd of the client that runs, its process id being in its file; None: none does."""
        with suppress(OSError, ValueError):
            pidfd = os.pidfd_open(int(self._pid_file.read_text()))
            # The number may be another's by now; a client is told by what it was started with.
            if self._is_ours(int(self._pid_file.read_text())):
                return pidfd
            os.close(pidfd)
        return None

    def _is_ours(self, pid: int) -> bool:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[:1] == [b"udhcpc"] and os.fsencode(self._pid_file) in words

    def _start(self, interface: str) -> int:
        """Start one, and return its pidfd. Raises OSError."""
        arguments = [
            *("udhcpc", "-f", "-R"),
            *("-i", interface),
            *("-s", str(_EVENT)),
            *("-p", str(self._pid_file)),
            *("-x", f"hostname:{self.hostname}"),
            *_PATIENCE,
            *(word for option in _OPTIONS for word in ("-O", option)),
        ]
        with suppress(ValueError, OSError):
            if (lease := self.lease()) is not None:
                arguments += ["-r", str(lease.address.ip)]
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LEASE": str(self.lease_file),
            "CHANGED": str(self._bell_file),
        }
        # Its words go where the agent's go, and do not end with the agent. Like that it is never
        # killed for memory, of which it takes no more than it begins with.
        console = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
        try:
            pid = posix_spawn(
                self.busybox,
                arguments,
                environment,
                cwd="/",
                stdio=(None, console, console),
                cgroup=self.cgroup,
            )
        finally:
            os.close(console)
        return os.pidfd_open(pid)

    @property
    def _pid_file(self) -> Path:
        return self.directory / "udhcpc.pid"

    @property
    def _bell_file(self) -> Path:
        return self.directory / "changed"
