"""Payload bytes <-> Envelope(trace_id, body).

Data frames, which carry nearly all bytes, take a path of their own (``data_frame``), with the
same result as the general one. The workload protocol is imported when it is first used: the
agent's start does not need it.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, get_args

import attrs
import orjson

from protocol.converter import Mismatch, kind_of, make_converter
from protocol.data_frame import DataFrame
from protocol.errors import MalformedMessage, ProtocolError
from protocol.requests import AgentRequest
from protocol.responses import AgentResponse
from protocol.values import U64_MAX

if TYPE_CHECKING:
    from protocol.workload import GuestMessage, HostMessage

    Message = AgentRequest | AgentResponse | HostMessage | GuestMessage

Body = TypeVar("Body")
Value = TypeVar("Value")

_SHOWN_CHARACTERS: Final = 64


@attrs.frozen
class Envelope(Generic[Body]):
    """A message, and the ``trace_id`` that came beside it."""

    trace_id: str | None
    body: Body


class Variants:
    """A tagged enum of the wire: which class is meant by which name under ``tag``."""

    def __init__(self, tag: str, union: object) -> None:
        self.tag = tag
        self.by_name: Mapping[str, type] = {wire_name(c): c for c in get_args(union)}
        frames = (DataFrame.of(c, tag, name) for name, c in self.by_name.items())
        self.frames: Mapping[bytes, DataFrame] = {frame.head: frame for frame in frames if frame}


def wire_name(variant: type) -> str:
    """The name that stands for a class under its tag: its own in snake case."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in variant.__name__).lstrip("_")


def _tags(enums: Iterable[Variants]) -> Mapping[type, Mapping[str, str]]:
    return {variant: {enum.tag: name} for enum in enums for name, variant in enum.by_name.items()}


_CONVERTER: Final = make_converter()
_REQUEST: Final = Variants("method", AgentRequest)
_RESPONSE: Final = Variants("status", AgentResponse)
_TAGS: Final = _tags((_REQUEST, _RESPONSE))
_FRAMES: Final[Mapping[type, DataFrame]] = {
    frame.variant: frame for enum in (_REQUEST, _RESPONSE) for frame in enum.frames.values()
}


@functools.cache
def _workload_variants() -> Mapping[object, Variants]:
    from protocol.workload import GuestMessage, HostMessage

    return {union: Variants("type", union) for union in (HostMessage, GuestMessage)}


@functools.cache
def _workload_tags() -> Mapping[type, Mapping[str, str]]:
    return _tags(_workload_variants().values())


def variants_of(union: object) -> Variants:
    """The variants of a kind of message; raises TypeError for anything else."""
    # By identity: hashing or comparing a union looks at each of its classes.
    if union is AgentRequest:
        return _REQUEST
    if union is AgentResponse:
        return _RESPONSE
    variants = _workload_variants().get(union)
    if variants is None:
        raise TypeError(f"not a kind of message: {union!r}")
    return variants


def decode(payload: bytes, kind: object) -> Envelope[Any]:
    """The message in a frame's payload, bare or in an envelope.

    ``kind`` is AgentRequest, AgentResponse, HostMessage or GuestMessage, and is what ``body``
    then is. Raises MalformedMessage for anything that is not one.
    """
    variants = variants_of(kind)
    frame = variants.frames.get(DataFrame.head_of(payload))
    if frame is not None and (body := frame.read(payload)) is not None:
        return Envelope(None, body)
    try:
        members = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        # Not chained: the cause holds the whole document.
        raise MalformedMessage(f"not JSON: {error}") from None
    if type(members) is not dict:
        raise MalformedMessage(f"expected an object, got {kind_of(members)}")
    trace_id = members.get("trace_id")
    return Envelope(trace_id if type(trace_id) is str else None, _structure(members, variants))


def _structure(members: dict[str, Any], variants: Variants) -> Any:
    tag = variants.tag
    name = members.get(tag)
    if type(name) is not str:
        got = kind_of(name) if tag in members else "nothing: the field is missing"
        raise MalformedMessage(f"{tag}: expected a string, got {got}")
    variant = variants.by_name.get(name)
    if variant is None:
        shown = orjson.dumps(name[:_SHOWN_CHARACTERS]).decode()
        known = ", ".join(variants.by_name)
        raise MalformedMessage(f"unknown {tag} {shown}; expected one of: {known}")
    try:
        return _CONVERTER.structure(members, variant)
    except Mismatch as fault:
        raise MalformedMessage(f"{name}{fault}") from None


def request_id_of(payload: bytes) -> int | None:
    """The ``request_id`` in a payload that is no message; None where there is none to be told."""
    try:
        members = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    request_id = members.get("request_id") if type(members) is dict else None
    is_one = type(request_id) is int and 0 <= request_id <= U64_MAX
    return request_id if is_one else None


def encode(message: "Message", trace_id: str | None = None) -> bytes:
    """The payload of a message, without its length, byte for byte as serde writes it.

    Raises ProtocolError for what JSON cannot carry: text that is not UTF-8, integers beyond 64
    bits, foreign objects in ``ok.data``.
    """
    variant = type(message)
    if trace_id is None and (frame := _FRAMES.get(variant)) is not None:
        payload = frame.write(message)
        if payload is not None:
            return payload
    members = {**(_TAGS.get(variant) or _workload_tags()[variant])}
    members.update(_CONVERTER.unstructure(message))
    if trace_id is not None:
        members = {"trace_id": trace_id, **members}
    try:
        return orjson.dumps(members, default=_unstructure_value)
    except orjson.JSONEncodeError as error:
        raise ProtocolError(f"{wire_name(variant)} cannot be written as JSON: {error}") from None


def frame_in_pieces(message: "Message", piece_size: int) -> Iterator[bytes] | None:
    """The frame of a message that carries data, its length before it, in pieces of at most
    ``piece_size`` bytes (a hundred or more), each encoded when it is taken; together exactly
    ``encode_frame(encode(message))``. None for any other message.

    Raises FrameTooLarge, before the first piece.
    """
    frame = _FRAMES.get(type(message))
    return None if frame is None else frame.write_pieces(message, piece_size)


def encoded(value: object) -> object:
    """A value for ``ok.data``, or a part of one, written now and once for many answers.

    The result is for nothing but that. Raises ProtocolError as ``encode``.
    """
    try:
        return orjson.Fragment(orjson.dumps(value, default=_unstructure_value))
    except orjson.JSONEncodeError as error:
        raise ProtocolError(f"{type(value).__name__} cannot be written as JSON: {error}") from None


def _unstructure_value(value: Any) -> Any:
    # Called by orjson for what it does not know: our values inside ok.data.
    if attrs.has(type(value)):
        return _CONVERTER.unstructure(value)
    raise TypeError  # orjson says which type it was


def decode_value(data: object, kind: type[Value]) -> Value:
    """A value such as ImageInfo from what ``ok.data`` holds; raises MalformedMessage."""
    try:
        return _CONVERTER.structure(data, kind)
    except Mismatch as fault:
        raise MalformedMessage(f"{kind.__name__}{fault}") from None
