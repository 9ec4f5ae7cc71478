"""The calls about clocks and random numbers as the kernel gets them: on devices that have neither.

/dev/null refuses them all, and strace(1), which knows them by itself, says what was asked. Nothing
here sets a clock: that, and what the devices answer, is for a VM.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.linux import clock
from tests.support.commands import find_program

PROJECT = Path(__file__).parents[3]


def asked(call: str, tmp_path: Path) -> str:
    """What strace saw of a call with the open /dev/null as `fd`, which must be refused."""
    program = (
        "import os\n"
        "from agent.linux import clock, random_device\n"
        "fd = os.open('/dev/null', os.O_RDWR)\n"
        f"try: {call}\n"
        "except OSError as error: print(error.strerror)\n"
    )
    log = tmp_path / "calls"
    names = "trace=ioctl,clock_gettime,timerfd_create,timerfd_settime"
    strace = [find_program("strace"), "-y", "-o", str(log), "-e", names]
    said = subprocess.run(
        [*strace, sys.executable, "-c", program],
        cwd=PROJECT,
        capture_output=True,
        check=True,
        text=True,
    )
    assert said.stdout in (
        "Inappropriate ioctl for device\n",
        "Invalid argument\n",
        "No such file or directory\n",
    ), said
    return log.read_text()


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        ("clock.ptp_sys_offset_precise(fd)", "</dev/null>, PTP_SYS_OFFSET_PRECISE"),
        (
            "random_device.rndaddentropy(fd, bytes(4096))",
            "</dev/null>, RNDADDENTROPY, ",
        ),
        ("random_device.rndreseedcrng(fd)", "</dev/null>, RNDRESEEDCRNG"),
        # The clock of descriptor 3.
        ("clock.clock_gettime(fd)", "clock_gettime(0xffffffe3"),
    ],
)
def test_devices_are_asked_by_their_own_requests(call: str, seen: str, tmp_path: Path) -> None:
    assert seen in asked(call, tmp_path)


def test_a_watched_clock_that_nobody_sets_says_nothing() -> None:
    timer = clock.timerfd_create(time.CLOCK_REALTIME)
    with clock_watch(timer), pytest.raises(BlockingIOError):
        os.read(timer, 8)


@contextmanager
def clock_watch(timer: int) -> Iterator[None]:
    try:
        flags = clock.TFD_TIMER_ABSTIME | clock.TFD_TIMER_CANCEL_ON_SET
        clock.timerfd_settime(timer, flags, int(time.time()) + 100_000)
        yield
    finally:
        os.close(timer)


def test_a_watch_of_the_clock_is_what_the_kernel_calls_so(tmp_path: Path) -> None:
    calls = asked(
        "clock.timerfd_settime(clock.timerfd_create(0), 3, 7258118400); fd = os.stat('')",
        tmp_path,
    )
    assert "timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC|TFD_NONBLOCK)" in calls
    assert "TFD_TIMER_ABSTIME|TFD_TIMER_CANCEL_ON_SET" in calls
    assert "it_value={tv_sec=7258118400, tv_nsec=0}" in calls
