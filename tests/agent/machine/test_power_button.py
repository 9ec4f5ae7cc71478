"""A press of the power button, as the kernel writes it: through a FIFO in the place of a device."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from agent.machine.power_button import PowerButton

EV_SYN, EV_KEY, KEY_A, KEY_POWER = 0, 1, 30, 116


def events(*each: tuple[int, int, int]) -> bytes:
    """Of type, code and value: struct input_event of linux/input.h, at some time."""
    return b"".join(struct.pack("@llHHi", 1_700_000_000, 5, *event) for event in each)


PRESS = events((EV_KEY, KEY_POWER, 1), (EV_SYN, 0, 0))
RELEASE = events((EV_KEY, KEY_POWER, 0), (EV_SYN, 0, 0))
OTHER = events((EV_KEY, KEY_A, 1), (EV_SYN, 0, 0), (EV_SYN, KEY_POWER, 1))


@pytest.fixture
def input_devices(tmp_path: Path) -> Path:
    """A keyboard and two buttons: below `class` what they are, in `devices` they themselves."""
    for name, title in (
        ("event0", "AT Translated Set 2 keyboard"),
        ("event1", "Power Button"),
        ("event2", "Power Button"),
    ):
        described = tmp_path / "class" / name / "device"
        described.mkdir(parents=True)
        (described / "name").write_text(f"{title}\n")
        (tmp_path / "devices").mkdir(exist_ok=True)
        os.mkfifo(tmp_path / "devices" / name)
    return tmp_path


@contextmanager
def watched(directory: Path) -> Iterator[PowerButton]:
    with PowerButton.watched(directory / "class", directory / "devices") as button:
        yield button


@pytest.mark.parametrize("device", ["event1", "event2"])
async def test_a_press_is_told_whichever_button_it_is(input_devices: Path, device: str) -> None:
    with watched(input_devices) as button, (input_devices / "devices" / device).open("wb") as sends:
        assert len(button) == 2
        sends.write(RELEASE + OTHER + PRESS)
        sends.flush()
        with trio.fail_after(5):
            await button.pressed()


async def test_nothing_else_is(input_devices: Path) -> None:
    with watched(input_devices) as button, (input_devices / "devices/event1").open("wb") as sends:
        sends.write(RELEASE + OTHER)
        sends.flush()
        with trio.move_on_after(0.2) as patience:
            await button.pressed()
        assert patience.cancelled_caught


async def test_a_machine_without_one_waits_for_ever(tmp_path: Path) -> None:
    with watched(tmp_path) as button:
        assert len(button) == 0
        with trio.move_on_after(0.1) as patience:
            await button.pressed()
        assert patience.cancelled_caught
