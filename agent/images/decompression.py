"""A layer's blob, decompressed as it arrives.

Media types are OCI's and docker's (https://github.com/opencontainers/image-spec/blob/main/layer.md);
what one states has to be what the blob begins with.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Protocol, cast

# Large enough that hashing and writing cost more than the calls, small enough for a CPU's cache
# and for many layers at once.
CHUNK_BYTES = 256 << 10

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# A zstd stream may begin with frames to be skipped, 0x184D2A50 to 0x184D2A5F.
_ZSTD_SKIPPABLE = frozenset(bytes((n, 0x2A, 0x4D, 0x18)) for n in range(0x50, 0x60))

# What follows ".tar" in OCI's and docker's media types.
_FORMS = {"": "plain", "+gzip": "gzip", ".gzip": "gzip", "+zstd": "zstd", ".zstd": "zstd"}


class DecompressionError(ValueError):
    """The blob is not what it should be; the text says what it is."""


class _Member(Protocol):
    """A decompressor of one gzip member or zstd frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class Decompression:
    """Compressed bytes in, at most `CHUNK_BYTES` of the tar out at a time.

    A stream is any number of gzip members or zstd frames, and nothing else.

    Raises:
        DecompressionError: no layer has such a media type.
    """

    def __init__(self, media_type: str) -> None:
        self._media_type = media_type
        _, tar, suffix = media_type.rpartition(".tar")
        if not tar or suffix not in _FORMS:
            raise DecompressionError(f"layers of media type {media_type[:100]!r} are not supported")
        self._form = _FORMS[suffix]
        self._start = b""
        self._started = False
        self._member: _Member | None = None
        self._damage: type[Exception] = DecompressionError

    def feed(self, data: bytes) -> Iterator[bytes | memoryview]:
        """The blob's next bytes in; what they hold out, to be used up.

        Raises:
            DecompressionError: they are damaged, or of another form.
        """
        if not self._started:
            self._start += data
            if len(self._start) < len(ZSTD_MAGIC):
                return
            data = self._begin()
        if self._form == "plain":
            view = memoryview(data)
            for start in range(0, len(view), CHUNK_BYTES):
                yield view[start : start + CHUNK_BYTES]
            return
        while data or (self._member is not None and not self._member.needs_input):
            member = self._member or self._new_member()
            try:
                chunk = member.decompress(data, CHUNK_BYTES)
            except self._damage as error:
                raise DecompressionError(f"its {self._form} stream is damaged: {error}") from None
            if chunk:
                yield chunk
            data = member.unused_data if member.eof else b""
            self._member = None if member.eof else member

    def finish(self) -> Iterator[bytes | memoryview]:
        """What was held back of a very short blob.

        Raises:
            DecompressionError: the stream is not at its end.
        """
        held_back = b"" if self._started else self._begin()
        if self._form == "plain":
            yield held_back
        elif held_back or self._member is not None:
            raise DecompressionError(f"its {self._form} stream ends too early")

    def _begin(self) -> bytes:
        """What was held back, now that it shows what the blob is."""
        start, self._start = self._start, b""
        self._started = True
        if start.startswith(GZIP_MAGIC):
            form = "gzip"
        elif start.startswith(ZSTD_MAGIC) or start[:4] in _ZSTD_SKIPPABLE:
            form = "zstd"
        else:
            form = "plain"
        if form != self._form:
            found = form if form != "plain" else "neither gzip nor zstd"
            raise DecompressionError(f"its media type is {self._media_type}, but it is {found}")
        return start

    def _new_member(self) -> _Member:
        # Imported when first used: together they cost 10 ms and 3 MB.
        member: _Member
        if self._form == "gzip":
            from isal import igzip_lib

            # Its stub says that this is an instance.
            self._damage = cast("type[Exception]", igzip_lib.IsalError)
            member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        elif sys.version_info >= (3, 14):
            from compression import zstd

            self._damage = zstd.ZstdError
            member = zstd.ZstdDecompressor()
        else:
            from backports import zstd

            self._damage = zstd.ZstdError
            member = zstd.ZstdDecompressor()
        return member
