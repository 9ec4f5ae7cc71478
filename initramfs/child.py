"""A program that must not outlive this one."""

import os
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import trio
from attrs import frozen

from initramfs.errors import BootError

T = TypeVar("T")

# The kernel sends it when the thread that started the program ends: see `started`.
_ENDED_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


@frozen
class Child:
    """A program that was started, and the descriptor of its process (see pidfd_open(2))."""

    name: str
    process: "subprocess.Popen[bytes]"
    pidfd: int

    @property
    def output(self) -> int:
        """The descriptor to read what it writes from."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    async def wait(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        await trio.lowlevel.wait_readable(self.pidfd)
        return self.process.wait()

    async def outlive(self, wanted: Callable[[], Awaitable[T]], within_s: float) -> T:
        """What `wanted` comes to, which only the running program can bring about.

        Raises:
            BootError: the program ended first, or the time was up.
        """
        results: list[T] = []

        async def watch(scope: trio.CancelScope) -> None:
            await self.wait()
            scope.cancel()

        with trio.move_on_after(within_s) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                results.append(await wanted())
                nursery.cancel_scope.cancel()
        if results:
            return results[0]
        if patience.cancelled_caught:
            raise BootError(f"{self.name} gave no sign of life within {within_s:.0f} s")
        raise BootError(f"{self.name} ended with status {self.process.wait()}")

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


@contextmanager
def started(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    output: int = subprocess.PIPE,
) -> Iterator[Child]:
    """Run a program for the block and kill it at the end; it dies, too, when we are killed.

    It is in a process group of its own, so that ^C is for us alone. From the main thread only:
    another one's end would end the program as well.

    Raises:
        BootError: there is no such program.
    """
    if shutil.which(argv[0]) is None:
        raise BootError(f"{argv[0]} is missing")
    process = subprocess.Popen(
        [*_ENDED_WITH_US, *argv],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=env,
        pass_fds=pass_fds,
        process_group=0,
    )
    with process:
        pidfd = os.pidfd_open(process.pid)
        child = Child(argv[0], process, pidfd)
        try:
            yield child
        finally:
            child.kill()
            process.wait()
            os.close(pidfd)
