"""Frames: a big-endian u32 length, then that many bytes of payload. No sockets here."""

import io

from protocol.constants import MAX_FRAME_SIZE
from protocol.errors import FrameTooLarge

_HEADER_SIZE = 4
_FIRST_PIECE_SIZE = 64 * 1024


def encode_frame(payload: bytes) -> bytes:
    """The payload with its length before it; raises FrameTooLarge above MAX_FRAME_SIZE."""
    return frame_header(payload) + payload


def frame_header(payload: bytes) -> bytes:
    """What goes before the payload; raises FrameTooLarge above MAX_FRAME_SIZE."""
    return sized_header(len(payload))


def sized_header(size: int) -> bytes:
    """The same for a payload of ``size`` bytes."""
    if size > MAX_FRAME_SIZE:
        raise _too_large(size)
    return size.to_bytes(_HEADER_SIZE, "big")


def frame_pieces(payload: bytes, piece_size: int | None = None) -> list[bytes | memoryview]:
    """The same bytes for senders: in pieces of at most ``piece_size``, or in two.

    Copies no more than the first piece. A second copy of a megabyte beside the first costs
    ten times its encoding, in memory that malloc fetches and returns each time.
    """
    view = memoryview(payload)
    start = (piece_size or _FIRST_PIECE_SIZE) - _HEADER_SIZE
    first = frame_header(payload) + view[:start]
    step = piece_size or MAX_FRAME_SIZE
    return [first, *(view[at : at + step] for at in range(start, len(view), step))]


class FrameDecoder:
    """Bytes in, payloads out.

    Give it what was received, then take frames until there are none: so it never holds more
    than one frame and one read. After FrameTooLarge the stream's position is lost: further
    bytes are dropped, and every further ``next_frame`` raises the same error.
    """

    def __init__(self) -> None:
        self.most_bytes = MAX_FRAME_SIZE
        """Of a payload; may be less for peers that are not to be trusted with more."""
        self._buffer = bytearray()
        # The payload of a frame that came in part. A BytesIO gives it away without a copy;
        # it grows with what arrives, since a header alone must not cost 32 MiB.
        self._partial: io.BytesIO | None = None
        self._missing = 0
        self._refused_size: int | None = None

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the stream, in pieces of any size."""
        if self._refused_size is not None:
            return
        if self._partial is not None and self._missing:
            view = memoryview(data)
            taken = self._partial.write(view[: self._missing])
            self._missing -= taken
            data = view[taken:]
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next whole payload, or None when more bytes are needed.

        Raises FrameTooLarge as soon as a header announces more than ``most_bytes``.
        """
        if self._partial is not None:
            return self._finished(self._partial)
        buffer = self._buffer
        if self._refused_size is not None:
            raise _too_large(self._refused_size, self.most_bytes)
        if len(buffer) < _HEADER_SIZE:
            return None
        size = int.from_bytes(buffer[:_HEADER_SIZE], "big")
        if size > self.most_bytes:
            buffer.clear()
            self._refused_size = size
            raise _too_large(size, self.most_bytes)
        end = _HEADER_SIZE + size
        with memoryview(buffer) as view:
            if len(buffer) >= end:
                payload = bytes(view[_HEADER_SIZE:end])
            else:
                payload = None
                self._partial = io.BytesIO()
                self._partial.write(view[_HEADER_SIZE:])
                self._missing = end - len(buffer)
        del buffer[:end]
        return payload

    def is_amid_frame(self) -> bool:
        """Whether bytes were received that belong to a frame which is not whole yet."""
        return self._partial is not None or bool(self._buffer)

    def _finished(self, partial: io.BytesIO) -> bytes | None:
        if self._missing:
            return None
        self._partial = None
        return partial.getvalue()


def _too_large(size: int, most_bytes: int = MAX_FRAME_SIZE) -> FrameTooLarge:
    return FrameTooLarge(f"frame too large: {size} bytes, at most {most_bytes} are allowed")
