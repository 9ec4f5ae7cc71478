"""Frames of all sizes, in pieces of all sizes."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import MAX_FRAME_SIZE, FrameDecoder, FrameTooLarge, encode_frame
from protocol.framing import frame_pieces

READ_SIZE = 64 * 1024


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(1, 30)))
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    payloads: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(map(encode_frame, payloads))
    decoder = FrameDecoder()
    received = []
    while stream:
        size = cuts.pop() if cuts else len(stream)
        decoder.receive_data(memoryview(stream)[:size])
        stream = stream[size:]
        while (payload := decoder.next_frame()) is not None:
            received.append(payload)
    assert received == payloads


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(1, 30)))
def test_frames_wait_until_they_are_taken(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(encode_frame, payloads))
    decoder = FrameDecoder()
    decoder.next_frame()
    for size in cuts:
        decoder.receive_data(stream[:size])
        stream = stream[size:]
    decoder.receive_data(stream)
    assert [decoder.next_frame() for _ in payloads] == payloads
    assert decoder.next_frame() is None


def test_the_largest_frame_costs_its_own_size_and_one_read() -> None:
    payload = bytes(MAX_FRAME_SIZE)
    frame = memoryview(encode_frame(payload))
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        received = None
        for start in range(0, len(frame), READ_SIZE):
            assert received is None
            decoder.receive_data(frame[start : start + READ_SIZE])
            received = decoder.next_frame()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert received == payload
    # A growing buffer has an eighth to spare.
    assert peak < MAX_FRAME_SIZE * 9 / 8 + 2 * READ_SIZE


def test_a_header_alone_costs_nothing() -> None:
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        decoder.receive_data(MAX_FRAME_SIZE.to_bytes(4, "big"))
        assert decoder.next_frame() is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < READ_SIZE


def test_one_byte_more_is_refused_at_the_header_and_for_good() -> None:
    decoder = FrameDecoder()
    decoder.receive_data(encode_frame(b"before") + (MAX_FRAME_SIZE + 1).to_bytes(4, "big"))
    assert decoder.next_frame() == b"before"
    with pytest.raises(FrameTooLarge, match="33554433 bytes, at most 33554432"):
        decoder.next_frame()
    decoder.receive_data(encode_frame(b"after"))
    with pytest.raises(FrameTooLarge):
        decoder.next_frame()


def test_no_frame_above_the_limit_is_written() -> None:
    assert len(encode_frame(bytes(MAX_FRAME_SIZE))) == MAX_FRAME_SIZE + 4
    with pytest.raises(FrameTooLarge):
        encode_frame(bytes(MAX_FRAME_SIZE + 1))


@pytest.mark.parametrize("piece_size", [None, 5, 100, 64 * 1024])
@pytest.mark.parametrize("size", [0, 1, 95, 96, 97, 300, 65_531, 65_532, 65_533, 200_000])
def test_the_pieces_of_a_frame_are_the_frame(size: int, piece_size: int | None) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    pieces = frame_pieces(payload, piece_size)
    assert b"".join(pieces) == encode_frame(payload)
    assert all(pieces)
    if piece_size is None:
        assert len(pieces) <= 2
    else:
        assert max(map(len, pieces)) <= piece_size


def test_pieces_of_a_frame_above_the_limit_are_refused_at_once() -> None:
    with pytest.raises(FrameTooLarge):
        frame_pieces(bytes(MAX_FRAME_SIZE + 1), 32 * 1024)


def test_an_empty_frame_is_a_frame() -> None:
    decoder = FrameDecoder()
    decoder.receive_data(encode_frame(b""))
    assert decoder.next_frame() == b""
