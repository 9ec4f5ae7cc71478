"""A layer's blob comes out as the tar that went in, or the error says what is wrong with it."""

import gzip
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.images.decompression import CHUNK_BYTES, Decompression, DecompressionError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

OCI = "application/vnd.oci.image.layer.v1.tar"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "+gzip": gzip.compress,
    "+zstd": zstd.compress,
}
SKIPPABLE = bytes((0x5A, 0x2A, 0x4D, 0x18)) + (5).to_bytes(4, "little") + b"hello"


def decompressed(blob: bytes, media_type: str, step: int = 1 << 20) -> bytes:
    decompression = Decompression(media_type)
    out = []
    for start in range(0, len(blob), step):
        out += decompression.feed(blob[start : start + step])
    out += decompression.finish()
    assert all(len(chunk) <= CHUNK_BYTES for chunk in out)
    return b"".join(out)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(COMPRESS)),
    st.lists(st.binary(max_size=2000).map(lambda data: data * 50), min_size=1, max_size=3),
    st.integers(1, 500),
)
def test_any_number_of_members_in_pieces_of_any_size_come_out(
    suffix: str, parts: list[bytes], step: int
) -> None:
    parts = [b"no magic of another form", *parts]
    blob = b"".join(COMPRESS[suffix](part) for part in parts)
    assert decompressed(blob, OCI + suffix, step) == b"".join(parts)


@pytest.mark.parametrize("suffix", ["+gzip", "+zstd"])
def test_a_bomb_comes_out_in_small_pieces(suffix: str) -> None:
    blob = COMPRESS[suffix](bytes(32 << 20))
    assert len(blob) < 1 << 16
    assert decompressed(blob, OCI + suffix) == bytes(32 << 20)


def test_skippable_frames_of_zstd_are_skipped() -> None:
    blob = SKIPPABLE + zstd.compress(b"one") + SKIPPABLE + zstd.compress(b"two") + SKIPPABLE
    for step in (1, 7, 1000):
        assert decompressed(blob, OCI + "+zstd", step) == b"onetwo"


@pytest.mark.parametrize(
    ("media_type", "suffix"),
    [
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "+gzip"),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", "+zstd"),
        ("application/vnd.docker.image.rootfs.diff.tar", ""),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "+gzip"),
    ],
)
def test_docker_s_media_types_are_known(media_type: str, suffix: str) -> None:
    assert decompressed(COMPRESS[suffix](b"tar" * 9), media_type) == b"tar" * 9


@pytest.mark.parametrize("media_type", ["", "text/plain", OCI + "+xz", OCI + "+gzip+encrypted"])
def test_others_are_refused(media_type: str) -> None:
    with pytest.raises(DecompressionError, match="are not supported"):
        Decompression(media_type)


@pytest.mark.parametrize(
    ("stated", "actual", "found"),
    [
        ("+gzip", "", "neither gzip nor zstd"),
        ("+gzip", "+zstd", "zstd"),
        ("+zstd", "+gzip", "gzip"),
        ("", "+gzip", "gzip"),
        ("", "+zstd", "zstd"),
    ],
)
def test_a_blob_of_another_form_than_stated_is_refused(
    stated: str, actual: str, found: str
) -> None:
    with pytest.raises(DecompressionError, match=f", but it is {found}$"):
        decompressed(COMPRESS[actual](b"a tar" * 100), OCI + stated)


@pytest.mark.parametrize("suffix", ["+gzip", "+zstd"])
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_a_stream_that_is_cut_short_is_refused(suffix: str, step: int) -> None:
    blob = COMPRESS[suffix](bytes(range(256)) * 100)
    for end in (0, 1, 3, 10, len(blob) // 2, len(blob) - 1):
        with pytest.raises(DecompressionError, match=r"ends too early|neither gzip nor zstd"):
            decompressed(blob[:end], OCI + suffix, step)


@pytest.mark.parametrize("suffix", ["+gzip", "+zstd"])
@pytest.mark.parametrize("rubbish", [b"rubbish" * 10, bytes(512)])
def test_what_follows_the_stream_and_is_none_is_refused(suffix: str, rubbish: bytes) -> None:
    with pytest.raises(DecompressionError, match="stream is damaged"):
        decompressed(COMPRESS[suffix](b"tar") + rubbish, OCI + suffix)


def test_a_wrong_checksum_is_noticed() -> None:
    blob = bytearray(gzip.compress(b"tar" * 100))
    blob[-6] ^= 1
    with pytest.raises(DecompressionError, match=r"gzip stream is damaged: .*checksum"):
        decompressed(bytes(blob), OCI + "+gzip")
    framed = zstd.compress(b"tar" * 100, options={zstd.CompressionParameter.checksum_flag: 1})
    with pytest.raises(DecompressionError, match=r"zstd stream is damaged: .*checksum"):
        decompressed(framed[:-1] + bytes((framed[-1] ^ 1,)), OCI + "+zstd")
