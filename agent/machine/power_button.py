"""The VM's power button: ACPI's, as the kernel's input devices tell of it (input_event_codes.h)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

INPUT_CLASS = Path("/sys/class/input")
DEVICES = Path("/dev/input")

# linux/input.h: struct input_event
_EVENT = struct.Struct("@llHHi")
_EV_KEY = 1
_KEY_POWER = 116
_PRESSED = 1
_NAME = "Power Button"


@attrs.frozen
class PowerButton:
    """All the buttons that there are, of which QEMU and others give a VM one or two."""

    _descriptors: tuple[int, ...]

    @classmethod
    @contextmanager
    def watched(
        cls, input_class: Path = INPUT_CLASS, devices: Path = DEVICES
    ) -> Iterator[PowerButton]:
        """Listen for the block. Raises OSError."""
        names = [
            path.name
            for path in sorted(input_class.glob("event*"))
            if (path / "device/name").read_text().strip() == _NAME
        ]
        descriptors: list[int] = []
        try:
            for name in names:
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                descriptors.append(os.open(devices / name, flags))
            yield cls(tuple(descriptors))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def __len__(self) -> int:
        return len(self._descriptors)

    async def pressed(self) -> None:
        """Return when one of them has been pressed; never, where there is none."""

        async def watch(descriptor: int) -> None:
            while not _is_press(await _read(descriptor)):
                pass
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for descriptor in self._descriptors:
                nursery.start_soon(watch, descriptor)
            if not self._descriptors:
                await trio.sleep_forever()


async def _read(descriptor: int) -> bytes:
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        try:
            return os.read(descriptor, 64 * _EVENT.size)
        except BlockingIOError:
            continue


def _is_press(data: bytes) -> bool:
    return any(event[2:] == (_EV_KEY, _KEY_POWER, _PRESSED) for event in _events(data))


def _events(data: bytes) -> Iterable[tuple[int, ...]]:
    return _EVENT.iter_unpack(data[: len(data) // _EVENT.size * _EVENT.size])
