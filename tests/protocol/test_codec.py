"""Every message both ways, and two paths that are one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import (
    MAX_FRAME_SIZE,
    AgentRequest,
    AgentResponse,
    FrameTooLarge,
    HostMessage,
    MalformedMessage,
    ProtocolError,
    decode,
    decode_value,
    encode,
    encode_frame,
    frame_in_pieces,
    requests,
    responses,
)
from protocol.values import ImageInfo, Mount, OverlayInfo
from tests.protocol.kinds import MESSAGE_IDS, MESSAGES, messages

DATA_FRAMES: list[tuple[Any, type[Any]]] = [
    (AgentRequest, requests.Stdin),
    (AgentRequest, requests.FileWriteChunk),
    (AgentResponse, responses.Stdout),
    (AgentResponse, responses.Stderr),
    (AgentResponse, responses.DataChunk),
]
IMAGE = ImageInfo(
    reference="docker.io/library/alpine:latest",
    digest="sha256:00",
    size=1,
    architecture="amd64",
    os="linux",
    layer_count=1,
    layers=("sha256:11",),
)


@pytest.mark.parametrize(("kind", "variant"), MESSAGES, ids=MESSAGE_IDS)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(kind: Any, variant: type[Any], data: Any) -> None:
    message = data.draw(messages(variant))
    trace_id = data.draw(st.none() | st.text(st.characters(codec="utf-8"), max_size=8))
    envelope = decode(encode(message, trace_id), kind)
    assert envelope.body == message
    assert envelope.trace_id == trace_id


@pytest.mark.parametrize(("kind", "variant"), DATA_FRAMES)
@given(data=st.data())
def test_both_paths_write_the_same(kind: Any, variant: type[Any], data: Any) -> None:
    message = data.draw(messages(variant))
    # With a trace id, a frame is written by way of JSON.
    enveloped = encode(message, "t")
    assert enveloped == b'{"trace_id":"t",' + encode(message)[1:]


@pytest.mark.parametrize("size", [49_151, 49_152, 49_153, 98_304, 1_000_000])
def test_both_paths_write_the_same_also_in_several_blocks(size: int) -> None:
    message = responses.DataChunk(bytes(range(256)) * (size // 256 + 1), done=False)
    payload = encode(message)
    assert encode(message, "t") == b'{"trace_id":"t",' + payload[1:]
    assert decode(payload, AgentResponse).body == message


@pytest.mark.parametrize("piece_size", [100, 1_000, 32 * 1024])
@pytest.mark.parametrize("done", [False, True])
@given(
    data=st.binary(max_size=400) | st.integers(24_500, 24_700).map(bytes) | st.just(bytes(100_000))
)
def test_the_pieces_of_a_data_frame_are_the_frame(data: bytes, done: bool, piece_size: int) -> None:
    message = responses.DataChunk(data, done)
    pieces = frame_in_pieces(message, piece_size)
    assert pieces is not None
    sent = list(pieces)
    assert b"".join(sent) == encode_frame(encode(message))
    assert max(map(len, sent)) <= piece_size
    assert all(sent)


def test_what_is_no_data_alone_is_not_written_in_pieces() -> None:
    assert frame_in_pieces(responses.Ok(), 100) is None
    digested = responses.DataChunk(b"", done=True, sha256="0" * 64, size=0)
    assert frame_in_pieces(digested, 100) is None


def test_a_data_frame_above_the_limit_has_not_one_piece() -> None:
    with pytest.raises(FrameTooLarge):
        frame_in_pieces(responses.DataChunk(bytes(MAX_FRAME_SIZE), done=False), 32 * 1024)


def outcome(payload: bytes, kind: Any) -> object:
    try:
        return decode(payload, kind).body
    except MalformedMessage as error:
        text = str(error)
        # A position may differ by the blank.
        return "not JSON" if text.startswith("not JSON") else text


@pytest.mark.parametrize(("kind", "variant"), DATA_FRAMES)
@given(data=st.data())
def test_both_paths_read_the_same(kind: Any, variant: type[Any], data: Any) -> None:
    payload = encode(data.draw(messages(variant)))
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(payload)))
        end = start + data.draw(st.integers(0, 2))
        new = data.draw(
            st.binary(max_size=2)
            | st.sampled_from([b"=", b"A", b"B", b"\\/", b'"', b",", b" ", b"true", b'"x":1,'])
        )
        payload = payload[:start] + new + payload[end:]
    # What ends in a blank is no data frame as serde writes it, so JSON decides.
    assert outcome(payload, kind) == outcome(payload + b" ", kind)


def test_data_frames_are_read_in_any_json_too() -> None:
    assert decode(b'{"data":"aGk=","method":"stdin"}', AgentRequest).body == requests.Stdin(b"hi")
    escaped = rb'{"method":"stdin","data":"\u0061Gk="}'
    assert decode(escaped, AgentRequest).body == requests.Stdin(b"hi")
    twice = b'{"method":"file_write_chunk","data":"","done":false,"done":true}'
    assert decode(twice, AgentRequest).body == requests.FileWriteChunk(b"", done=True)


def test_a_data_frame_of_another_kind_is_not_taken() -> None:
    with pytest.raises(MalformedMessage, match='unknown status "stdin"'):
        decode(b'{"status":"stdin","data":""}', AgentResponse)
    with pytest.raises(MalformedMessage, match="method: expected a string"):
        decode(encode(responses.Stdout(b"x")), AgentRequest)


def test_values_inside_ok_are_written_as_they_are_elsewhere() -> None:
    overlay = OverlayInfo("/r", "/u", "/w")
    answer = responses.Ok(
        {"overlay": overlay, "images": [IMAGE], "mounts": (Mount("t", "/p", True),)}
    )
    body = decode(encode(answer), AgentResponse).body
    assert list(body.data["images"][0])[:4] == ["reference", "digest", "size", "created"]
    assert decode_value(body.data["images"], tuple[ImageInfo, ...]) == (IMAGE,)
    assert decode_value(body.data["overlay"], OverlayInfo) == overlay
    assert body.data["mounts"] == [["t", "/p", True]]


def test_a_value_that_does_not_fit_says_where() -> None:
    with pytest.raises(MalformedMessage) as raised:
        decode_value({"rootfs_path": "/r", "upper_path": 1}, OverlayInfo)
    assert str(raised.value) == "OverlayInfo.upper_path: expected a string, got an integer"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ({"n": 2**64}, "64-bit"),
        ({"path": "\udcff"}, "UTF-8"),
        ({"data": b"x"}, "serializable: bytes"),
        ({1: 2}, "key must be str"),
    ],
)
def test_what_json_cannot_carry_is_a_protocol_error(data: object, cause: str) -> None:
    with pytest.raises(ProtocolError, match="^ok cannot be written as JSON: .*" + cause):
        encode(responses.Ok(data))


def test_a_file_name_that_is_no_utf8_does_not_keep_an_error_from_arriving() -> None:
    payload = encode(responses.Error("open '/tmp/\udcff': no such file", "FILE_IO_FAILED"))
    assert decode(payload, AgentResponse).body.message == r"open '/tmp/\udcff': no such file"


def test_messages_know_their_kind() -> None:
    with pytest.raises(TypeError, match="not a kind of message"):
        decode(b"{}", requests.Ping)
    with pytest.raises(MalformedMessage, match='unknown type "ping"'):
        decode(b'{"type":"ping"}', HostMessage)


@pytest.mark.parametrize(
    "payload",
    [b'{"method":"stdin","data":"}', b'{"method":"file_write_chunk","data":","done":true}'],
)
def test_the_quote_that_opens_the_data_does_not_also_end_it(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(payload, AgentRequest)
