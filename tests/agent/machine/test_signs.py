"""Events of the kernel: which one is news, and that nothing else is."""

import os

import pytest
import trio

from agent.machine.signs import ClockJumps, Generations, is_new_generation

# As Linux 6.12 writes it.
NEWS = b"5,1301,61022013,-;random: crng reseeded due to virtual machine fork\n"


@pytest.mark.parametrize(
    ("record", "is_news"),
    [
        (NEWS, True),
        (NEWS + b" SUBSYSTEM=acpi\n DEVICE=+acpi:QEMUVGID:00\n", True),
        # Any root may write to the log, but not in the kernel's name: 8 and up.
        (NEWS.replace(b"5,", b"13,", 1), False),
        (NEWS.replace(b"random:", b"x random:"), False),
        (b"6,1,0,-;Linux version 6.12\n " + NEWS, False),
        (b"", False),
    ],
)
def test_a_new_generation_is_the_kernels_own_word(record: bytes, is_news: bool) -> None:
    assert is_new_generation(record) is is_news


async def test_the_log_is_followed_to_the_word() -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        generations = Generations(reading)
        os.write(writing, b"6,1300,61021013,-;pci 0000:00:01.0: enabled\n")
        with trio.move_on_after(0.2) as patience:
            await generations.next()
        assert patience.cancelled_caught
        os.write(writing, NEWS)
        with trio.fail_after(5):
            await generations.next()
    finally:
        os.close(reading)
        os.close(writing)


async def test_a_clock_that_nobody_has_set_does_not_jump() -> None:
    with ClockJumps.watched() as jumps:
        assert not jumps.forget()
        with trio.move_on_after(0.2) as patience:
            await jumps.next()
        assert patience.cancelled_caught
