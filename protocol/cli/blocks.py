"""Bytes between a task and a thread that takes or gives them as a file; few at a time."""

from __future__ import annotations

import io
from typing import Final

import trio

_WAITING_BLOCKS: Final = 2


class BlockWriter(io.RawIOBase):
    """A file to write to in a thread of trio's; each write waits until there is room for it."""

    def __init__(self, sender: trio.MemorySendChannel[bytes]) -> None:
        self._sender = sender

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """Raises BrokenResourceError when nobody takes it any more."""
        block = bytes(data)  # type: ignore[call-overload]
        trio.from_thread.run(self._sender.send, block)
        return len(block)


class BlockReader(io.RawIOBase):
    """A file to read from in a thread of trio's; each read waits until there is something."""

    def __init__(self, receiver: trio.MemoryReceiveChannel[bytes]) -> None:
        self._receiver = receiver
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        if not self._left:
            try:
                self._left = memoryview(trio.from_thread.run(self._receiver.receive))
            except trio.EndOfChannel:
                return 0
        target = memoryview(buffer)  # type: ignore[arg-type]
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def open_blocks() -> tuple[trio.MemorySendChannel[bytes], trio.MemoryReceiveChannel[bytes]]:
    """The two ends for one of the above and a task."""
    return trio.open_memory_channel[bytes](_WAITING_BLOCKS)
