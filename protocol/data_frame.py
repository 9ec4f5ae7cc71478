"""The byte-level path for frames that carry data.

Base64 inside a few fixed bytes needs no JSON. This path writes exactly what the general one
writes, and reads only the exact bytes that serde writes: for anything else it declines, and
the general path decides, so what is accepted never depends on the path.
"""

import io
from collections.abc import Iterator
from typing import Any, Final, Self

import attrs

from protocol.converter import decode_base64, encode_base64
from protocol.fields import OMITTED
from protocol.framing import sized_header

_DATA: Final = b'","data":"'
_ENDINGS: Final = {None: b'"}', False: b'","done":false}', True: b'","done":true}'}
_FIELDS: Final = ([("data", bytes)], [("data", bytes), ("done", bool)])
_LONGEST_HEAD: Final = 64
_BLOCK: Final = 48 * 1024
"""Bytes of data encoded at once: no remainder for base64, and small enough for the cache."""


@attrs.frozen
class DataFrame:
    """How messages of one class look on the wire: head, data, ending."""

    variant: type[Any]
    head: bytes
    has_done: bool
    omitted: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, variant: type[Any], tag: str, name: str) -> Self | None:
        """The frame of a class whose only fields are ``data``, or ``data`` and ``done``, but for
        those that may be left out."""
        fields, omitted = [], []
        for field in attrs.fields(variant):
            if field.metadata == OMITTED:
                omitted.append((field.name, field.default))
            else:
                fields.append((field.name, field.type))
        if fields not in _FIELDS:
            return None
        head = f'{{"{tag}":"{name}'.encode()
        return cls(variant, head, has_done=len(fields) > 1, omitted=tuple(omitted))

    @staticmethod
    def head_of(payload: bytes) -> bytes:
        """What stands before the data, or nothing."""
        return payload[: max(0, payload.find(_DATA, 0, _LONGEST_HEAD))]

    def read(self, payload: bytes) -> Any:
        """The message in a payload with this head, or None: not written as serde does."""
        start = len(self.head) + len(_DATA)
        for done in (False, True) if self.has_done else (None,):
            ending = _ENDINGS[done]
            # The quote that opens the data must not be taken for the one that ends it.
            if payload.endswith(ending, start):
                try:
                    data = decode_base64(memoryview(payload)[start : -len(ending)])
                except ValueError:
                    return None
                return self.variant(data) if done is None else self.variant(data, done)
        return None

    def write(self, message: Any) -> bytes | None:
        """The payload of a message of this class, or None: it has more to say than data."""
        if not self._says_data_only(message):
            return None
        data = message.data
        ending = self._ending(message)
        if len(data) <= _BLOCK:
            return b"".join((self.head, _DATA, encode_base64(data), ending))
        # Into one buffer of the final size: encoding all and then joining has malloc fetch
        # and return megabytes each time, and page faults cost five times the encoding.
        payload = io.BytesIO()
        payload.seek(len(self.head) + len(_DATA) + (len(data) + 2) // 3 * 4 + len(ending) - 1)
        payload.write(ending[-1:])
        payload.seek(0)
        payload.write(self.head)
        payload.write(_DATA)
        view = memoryview(data)
        for start in range(0, len(data), _BLOCK):
            payload.write(encode_base64(view[start : start + _BLOCK]))
        payload.write(ending)
        return payload.getvalue()

    def write_pieces(self, message: Any, piece_size: int) -> Iterator[bytes] | None:
        """The whole frame of such a message, in pieces of at most ``piece_size`` bytes, each made
        when it is taken; None as from ``write``. Raises FrameTooLarge, now.

        A piece is still in the processor's cache when it is sent, and nothing needs megabytes.
        """
        if not self._says_data_only(message):
            return None
        data = message.data
        ending = self._ending(message)
        size = len(self.head) + len(_DATA) + (len(data) + 2) // 3 * 4 + len(ending)
        before = b"".join((sized_header(size), self.head, _DATA))
        return _pieces(before, memoryview(data), ending, piece_size)

    def _says_data_only(self, message: Any) -> bool:
        return all(getattr(message, name) == default for name, default in self.omitted)

    def _ending(self, message: Any) -> bytes:
        return _ENDINGS[message.done if self.has_done else None]


def _pieces(before: bytes, data: memoryview, ending: bytes, piece_size: int) -> Iterator[bytes]:
    end = (piece_size - len(before)) // 4 * 3
    piece = before + encode_base64(data[:end])
    while end < len(data):
        yield piece
        start, end = end, end + piece_size // 4 * 3
        piece = encode_base64(data[start:end])
    if len(piece) + len(ending) <= piece_size:
        yield piece + ending
    else:
        yield piece
        yield ending
