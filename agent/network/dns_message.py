"""DNS messages, as far as one who passes them on has to read them: RFC 1035 section 4, RFC 6891."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import attrs

_HEADER = struct.Struct("!HBBHHHH")
_COUNTS_AT = 4

# The flags, as the third and the fourth byte have them.
_QR, _OPCODE, _TC, _RD = 0x80, 0x78, 0x02, 0x01
_RA, _CD = 0x80, 0x10
_SERVFAIL = 2

_TYPE_OPT = 41
_ROOT = 0
_COMPRESSED = 0xC0
_LABEL_BYTES = 63

_CLASSIC_UDP_BYTES = 512
# What fits a datagram over IPv4.
_UDP_BYTES = 65507


@attrs.frozen
class _Record:
    start: int
    end: int
    type: int
    size: int
    """Its class, which in OPT is the size of datagrams that the sender takes."""


@attrs.frozen
class _Parsed:
    question_end: int
    answers: list[_Record]
    opt: _Record | None


def is_query(message: bytes) -> bool:
    """Whether it is to be answered at all, by whatever."""
    return len(message) >= _HEADER.size and not message[2] & _QR


def is_answer(message: bytes, query: bytes) -> bool:
    """Whether it is one to ``query``."""
    return len(message) >= _HEADER.size and message[:2] == query[:2] and bool(message[2] & _QR)


def udp_limit(query: bytes) -> int:
    """How many bytes a datagram with the answer may have: what EDNS says, or 512."""
    try:
        opt = _parse(query).opt
    except ValueError:
        opt = None
    size = 0 if opt is None else opt.size
    return min(max(size, _CLASSIC_UDP_BYTES), _UDP_BYTES)


def failure(query: bytes) -> bytes:
    """SERVFAIL for a query: its id, its question, and EDNS where it has that."""
    identity, flags, more, questions, *_ = _HEADER.unpack_from(query)
    question, opt = b"", b""
    try:
        parsed = _parse(query)
    except ValueError:
        questions = 0
    else:
        question = query[_HEADER.size : parsed.question_end]
        if parsed.opt is not None:
            # Without options; what it says of the size is as good as anything.
            opt = struct.pack("!BHHLH", _ROOT, _TYPE_OPT, _CLASSIC_UDP_BYTES, 0, 0)
    flags = _QR | flags & (_OPCODE | _RD)
    more = _RA | more & _CD | _SERVFAIL
    header = _HEADER.pack(identity, flags, more, questions, 0, 0, 1 if opt else 0)
    return header + question + opt


def shortened(answer: bytes, limit: int) -> bytes:
    """At most ``limit`` (512 or more) bytes of an answer: as many of its records as fit, whole.

    The TC bit says where one is missing that was asked for, RFC 2181 section 9.

    Raises:
        ValueError: it is too long, and no DNS message.
    """
    if len(answer) <= limit:
        return answer
    parsed = _parse(answer)
    opt = b"" if parsed.opt is None else answer[parsed.opt.start : parsed.opt.end]
    if parsed.question_end + len(opt) > limit:
        opt = b""
    kept = [record for record in parsed.answers if record.end + len(opt) <= limit]
    end = kept[-1].end if kept else parsed.question_end
    identity, flags, more, questions, *_ = _HEADER.unpack_from(answer)
    counts = (questions, len(kept), 0, 1 if opt else 0)
    if not kept or len(kept) < len(parsed.answers):
        flags |= _TC
    header = _HEADER.pack(identity, flags, more, *counts)
    return header + answer[_HEADER.size : end] + opt


def _parse(message: bytes) -> _Parsed:
    """Where the parts of a message are. Raises ValueError."""
    try:
        questions, answers, authorities, additional = struct.unpack_from(
            "!HHHH", message, _COUNTS_AT
        )
        offset = _HEADER.size
        for _ in range(questions):
            offset = _after_name(message, offset) + 4
        if offset > len(message):
            raise ValueError("a question is cut short")
        records = _records(message, offset)
        of_answer = [next(records) for _ in range(answers)]
        others = [next(records) for _ in range(authorities + additional)]
        opt = next((each for each in others[authorities:] if each.type == _TYPE_OPT), None)
    except (IndexError, struct.error, StopIteration) as error:
        raise ValueError("not a DNS message") from error
    return _Parsed(offset, of_answer, opt)


def _records(message: bytes, offset: int) -> Iterator[_Record]:
    while offset < len(message):
        start = offset
        offset = _after_name(message, start)
        kind, size, _, length = struct.unpack_from("!HHLH", message, offset)
        offset += 10 + length
        if offset > len(message):
            raise ValueError("a record is cut short")
        yield _Record(start, offset, kind, size)


def _after_name(message: bytes, offset: int) -> int:
    while (length := message[offset]) != _ROOT:
        if length >= _COMPRESSED:
            return offset + 2
        if length > _LABEL_BYTES:
            raise ValueError("a label of an unknown kind")
        offset += 1 + length
    return offset + 1
