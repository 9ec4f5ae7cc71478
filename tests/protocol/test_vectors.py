"""The exact bytes of the reference implementation, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest

from protocol import (
    AgentRequest,
    FrameDecoder,
    ProtocolError,
    decode,
    encode,
    encode_frame,
)
from tests.protocol.kinds import KINDS

VECTORS = Path(__file__).parent / "vectors"


def rows(name: str) -> list[Any]:
    parsed = [json.loads(line) for line in (VECTORS / name).read_text().splitlines()]
    return [pytest.param(row, id=f"{row['type']}-{row['name']}") for row in parsed]


@pytest.mark.parametrize("row", rows("encode.jsonl"))
def test_what_the_reference_writes_is_read_and_written_the_same(row: dict[str, str]) -> None:
    payload = row["json"].encode()
    kind = KINDS[row["type"].removeprefix("Envelope<").removesuffix(">")]
    envelope = decode(payload, kind)
    assert encode(envelope.body, envelope.trace_id) == payload
    frame = encode_frame(payload)
    assert frame[:4].hex() == row["frame_header"]
    assert ("trace_id" in row["json"]) == (envelope.trace_id is not None)


@pytest.mark.parametrize("row", rows("encode.jsonl"))
def test_a_frame_is_found_whole_byte_by_byte_and_with_trailing_bytes(row: dict[str, str]) -> None:
    payload = row["json"].encode()
    frame = encode_frame(payload)

    whole = FrameDecoder()
    whole.receive_data(frame)
    assert whole.next_frame() == payload
    assert whole.next_frame() is None

    dripping = FrameDecoder()
    for index in range(len(frame)):
        assert dripping.next_frame() is None
        dripping.receive_data(frame[index : index + 1])
    assert dripping.next_frame() == payload

    trailing = FrameDecoder()
    trailing.receive_data(frame + frame[:-1])
    assert trailing.next_frame() == payload
    assert trailing.next_frame() is None
    trailing.receive_data(frame[-1:])
    assert trailing.next_frame() == payload


@pytest.mark.parametrize("row", rows("decode.jsonl"))
def test_what_the_reference_takes_is_taken_and_nothing_else(row: dict[str, Any]) -> None:
    data = bytes.fromhex(row["input_hex"])
    assert _is_taken(data, row["type"]) == row["accept"]


def _is_taken(data: bytes, kind: str) -> bool:
    try:
        if kind != "frame":
            decode(data, KINDS[kind])
            return True
        decoder = FrameDecoder()
        decoder.receive_data(data)
        payload = decoder.next_frame()
        if payload is None:
            return False
        decode(payload, AgentRequest)
    except ProtocolError:
        return False
    return True
