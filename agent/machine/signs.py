"""Events that tell of a VM which is not what it was a moment ago.

That the hypervisor has given it a new generation id (VMGENID: the VM is a copy, or was set back to
a snapshot) the kernel puts into its log, and nowhere else: the device event that Linux 6.9 was to
have for it was taken back. That the clock was set is an event of timerfd's. Of a mere pause the
kernel tells nobody, since nothing in the VM has gone on meanwhile: pauses.py looks for them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from agent.linux import clock

KMSG = Path("/dev/kmsg")
_LONGEST_RECORD = 8192
# drivers/char/random.c, when it has mixed in the new id.
_NEW_GENERATION = b"random: crng reseeded due to virtual machine fork"
_MOST_KERN_PRIORITY = 7
# Never: in the year 2200.
_FAR_S = 7_258_118_400


@attrs.frozen
class Generations:
    """Tells when the hypervisor has said that this VM is another one now.

    ``descriptor`` is open on the kernel's log, behind what is in it already.
    """

    descriptor: int

    @classmethod
    @contextmanager
    def watched(cls, log: Path = KMSG) -> Iterator[Generations]:
        """Follow the kernel's log for the block. Raises OSError."""
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.lseek(descriptor, 0, os.SEEK_END)
            yield cls(descriptor)
        finally:
            os.close(descriptor)

    async def next(self) -> None:
        """Return when there is a new one."""
        while True:
            await trio.lowlevel.wait_readable(self.descriptor)
            try:
                record = os.read(self.descriptor, _LONGEST_RECORD)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                continue  # some were overwritten before they were read
            if is_new_generation(record):
                return


def is_new_generation(record: bytes) -> bool:
    """Whether a record, "PRIORITY,SEQUENCE,TIME,FLAGS;TEXT" and lines below, is that one.

    What processes write there has other priorities, of the facility "user" and up.
    """
    head, _, text = record.partition(b";")
    priority = head.partition(b",")[0]
    is_kernels = priority.isdigit() and int(priority) <= _MOST_KERN_PRIORITY
    return is_kernels and text.partition(b"\n")[0] == _NEW_GENERATION


@attrs.frozen
class ClockJumps:
    """Tells when somebody has set the clock, the kernel itself after a sleep among them."""

    _timer: int

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[ClockJumps]:
        """Watch for the block. Raises OSError."""
        timer = clock.timerfd_create(time.CLOCK_REALTIME)
        try:
            flags = clock.TFD_TIMER_ABSTIME | clock.TFD_TIMER_CANCEL_ON_SET
            try:
                clock.timerfd_settime(timer, flags, _FAR_S)
            except OSError as error:
                if error.errno != errno.ECANCELED:
                    raise
            yield cls(timer)
        finally:
            os.close(timer)

    async def next(self) -> None:
        """Return when it has happened."""
        while True:
            await trio.lowlevel.wait_readable(self._timer)
            if self.forget():
                return

    def forget(self) -> bool:
        """Whether it has happened since the last time that somebody asked; ours is not news."""
        try:
            os.read(self._timer, 8)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        return True
