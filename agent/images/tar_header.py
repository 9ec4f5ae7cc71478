"""One tar header: read as Go's archive/tar and GNU tar read it, written as mkfs.erofs reads it.

Formats: POSIX ustar and PAX (https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html),
GNU and star (https://www.gnu.org/software/tar/manual/html_node/Standard.html), and what was there
before them (V7). Names and values are bytes: what they mean is the kernel's business.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import attrs

BLOCK = 512

REGULAR = b"0"
HARD_LINK = b"1"
SYMLINK = b"2"
CHARACTER_DEVICE = b"3"
BLOCK_DEVICE = b"4"
DIRECTORY = b"5"
FIFO = b"6"
CONTIGUOUS = b"7"
PAX_GLOBAL = b"g"
PAX_RECORDS = b"x"
GNU_LONG_NAME = b"L"
GNU_LONG_LINK = b"K"
GNU_SPARSE = b"S"

# Of POSIX's letters for anything that a program likes, one that mkfs.erofs passes over.
ASIDE = b"Z"

KINDS = frozenset(
    (REGULAR, HARD_LINK, SYMLINK, CHARACTER_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO, GNU_SPARSE)
)

_XATTR = b"SCHILY.xattr."
# The attributes that EROFS can hold; others (macOS writes some) docker leaves out too.
_XATTR_NAME = re.compile(
    rb"(?:user|trusted|security)\.[^\0]+|system\.posix_acl_(?:access|default)", re.DOTALL
)
# What overlayfs keeps for itself comes from whiteouts only: a layer's own could point anywhere.
_XATTR_OF_OVERLAYFS = b"trusted.overlay."
# mkfs.erofs 1.8.6 ends with EIO above 32 KiB an entry; most file systems have less.
_MAX_XATTR_BYTES = 31 << 10

# Most headers: no device, no prefix, and numbers of the usual widths.
_COMMON = re.compile(
    rb"(.{100})000([0-7]{4})\0([0-7]{7})\0([0-7]{7})\0([0-7]{11})\0([0-7]{11})[\0 ].{8}"
    rb"([0125])(.{100})(?:ustar\x0000|ustar  \0).{80}\0{167}",
    re.DOTALL,
)
_TIME = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?")
_OCTAL = re.compile(rb"[0-7]+")
_MAX_ID = 0xFFFF_FFFF
_MAX_MAJOR = 0xFFF
_MAX_MINOR = 0xF_FFFF


class TarError(ValueError):
    """The archive cannot become a layer; the text names the entry and the cause."""


@attrs.define
class Header:
    """What an archive says of one entry; ``size`` is the bytes of content that follow it."""

    kind: bytes
    path: bytes
    link: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)


def kind_of(block: bytes) -> bytes:
    """The type of the header in a block.

    Raises:
        TarError: it is no header.
    """
    if not _has_right_checksum(block):
        raise TarError("no tar header follows, nor the end of the archive")
    return block[156:157]


def size_of(block: bytes) -> int:
    """The size that a header states."""
    return _number(block[124:136])


def decode(block: bytes) -> Header:
    """The header in a block, before what earlier PAX or GNU entries say of it.

    Raises:
        TarError: a number is none.
    """
    common = _COMMON.fullmatch(block)
    if common is not None:
        path, mode, uid, gid, size, mtime, kind, link = common.groups()
        return Header(
            kind,
            _text(path),
            _text(link),
            int(mode, 8),
            int(uid, 8),
            int(gid, 8),
            int(size, 8),
            int(mtime, 8) * 10**9,
        )
    kind = block[156:157]
    path = _text(block[:100])
    if block[257:263] == b"ustar\0":
        # star has times behind a shorter prefix.
        prefix = _text(block[345:476] if block[508:] == b"tar\0" else block[345:500])
        if prefix:
            path = prefix + b"/" + path
    if kind == b"\0":
        kind = DIRECTORY if path.endswith(b"/") else REGULAR
    elif kind == CONTIGUOUS:
        kind = REGULAR
    is_device = kind in (CHARACTER_DEVICE, BLOCK_DEVICE)
    return Header(
        kind=kind,
        path=path,
        link=_text(block[157:257]),
        mode=_number(block[100:108]) & 0o7777,
        uid=_number(block[108:116]),
        gid=_number(block[116:124]),
        size=size_of(block),
        mtime_ns=_number(block[136:148]) * 10**9,
        major=_number(block[329:337]) if is_device else 0,
        minor=_number(block[337:345]) if is_device else 0,
    )


def parse_records(body: bytes) -> list[tuple[bytes, bytes]]:
    """The records of a PAX header, in their order: "<length> <keyword>=<value>\\n" each.

    Raises:
        TarError: they are not like that.
    """
    records = []
    start = 0
    while start < len(body):
        space = body.find(b" ", start, start + 10)
        length = body[start:space] if space > 0 else b""
        end = start + int(length) if length.isdigit() else 0
        if not space < end <= len(body) or body[end - 1] != 0x0A:
            raise TarError("a PAX header that follows is damaged")
        keyword, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise TarError("a PAX header that follows is damaged")
        records.append((keyword, value))
        start = end
    return records


def apply_records(header: Header, records: Iterable[tuple[bytes, bytes]]) -> None:
    """Let PAX records override the header; unknown ones mean nothing, as POSIX has it.

    Raises:
        TarError: a value is not what its keyword needs.
    """
    for keyword, value in records:
        if keyword.startswith(_XATTR):
            name = keyword[len(_XATTR) :]
            if _XATTR_NAME.fullmatch(name) and not name.startswith(_XATTR_OF_OVERLAYFS):
                header.xattrs[name] = value
        elif not value:
            continue  # "as if the record were not there"
        elif keyword == b"path":
            header.path = value
        elif keyword == b"linkpath":
            header.link = value
        elif keyword == b"mtime":
            header.mtime_ns = _nanoseconds(value)
        elif keyword == b"size":
            header.size = _decimal(value)
        elif keyword == b"uid":
            header.uid = _decimal(value)
        elif keyword == b"gid":
            header.gid = _decimal(value)


def validate(header: Header) -> None:
    """Raise TarError for what no file system of ours could hold, or mkfs.erofs would misread."""
    if header.kind not in KINDS:
        raise TarError(f"its type is {header.kind!r}, which is none that a layer may have")
    if not header.path or b"\0" in header.path or b"\0" in header.link:
        raise TarError("its name or target is empty or holds a NUL byte")
    if header.kind in (SYMLINK, HARD_LINK) and not header.link:
        raise TarError("it links to nothing")
    if header.size < 0:
        raise TarError("its size is negative")
    if not (0 <= header.uid <= _MAX_ID and 0 <= header.gid <= _MAX_ID):
        raise TarError(f"its owner is {header.uid}:{header.gid}, beyond 32 bits")
    if sum(len(name) + len(value) + 8 for name, value in header.xattrs.items()) > _MAX_XATTR_BYTES:
        raise TarError(f"it has more than {_MAX_XATTR_BYTES >> 10} KiB of extended attributes")
    if not (0 <= header.major <= _MAX_MAJOR and 0 <= header.minor <= _MAX_MINOR):
        raise TarError(f"its device number is {header.major}:{header.minor}, beyond 12:20 bits")


def encode(header: Header) -> bytes:
    """The header as mkfs.erofs reads it right: ustar, after a PAX header where that is too small.

    mkfs.erofs takes a time's fraction as a whole number, so it is written with all nine digits.
    """
    records = [(_XATTR + name, value) for name, value in header.xattrs.items()]
    seconds, fraction = divmod(header.mtime_ns, 10**9)
    path, link, size, uid, gid = header.path, header.link, header.size, header.uid, header.gid
    if len(path) > 100:
        records.append((b"path", path))
        path = b"-"
    if len(link) > 100:
        records.append((b"linkpath", link))
        link = b"-"
    if size >= 8**11:
        records.append((b"size", b"%d" % size))
        size = 0
    if uid >= 8**7:
        records.append((b"uid", b"%d" % uid))
        uid = 0
    if gid >= 8**7:
        records.append((b"gid", b"%d" % gid))
        gid = 0
    if fraction or not 0 <= seconds < 8**11:
        records.append((b"mtime", _time(header.mtime_ns)))
        seconds = 0
    block = _block(
        header.kind, path, link, header.mode, uid, gid, size, seconds, header.major, header.minor
    )
    if not records:
        return block
    body = b"".join(_record(keyword, value) for keyword, value in records)
    before = _block(PAX_RECORDS, b"-", b"", 0, 0, 0, len(body), 0, 0, 0)
    return before + body + bytes(-len(body) % BLOCK) + block


def aside(size: int) -> bytes:
    """The header of ``size`` bytes that are nothing to mkfs.erofs."""
    return encode(Header(ASIDE, b"-", size=size))


def _block(
    kind: bytes,
    path: bytes,
    link: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    major: int,
    minor: int,
) -> bytes:
    start = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        path.ljust(100, b"\0"),
        mode,
        uid,
        gid,
        size,
        mtime,
    )
    end = b"%b%bustar\x0000%b%07o\0%07o\0%b" % (
        kind,
        link.ljust(100, b"\0"),
        bytes(64),
        major,
        minor,
        bytes(167),
    )
    total = _sum(start) + _sum(end) + 8 * 0x20
    return b"%b%06o\0 %b" % (start, total, end)


def _record(keyword: bytes, value: bytes) -> bytes:
    # The length counts its own digits.
    length = len(keyword) + len(value) + 3
    digits = len(str(length))
    digits = len(str(length + digits))
    return b"%d %b=%b\n" % (length + digits, keyword, value)


def _has_right_checksum(block: bytes) -> bool:
    """Whether bytes 148 to 155 are the octal sum of all others and of eight spaces."""
    try:
        stated = _number(block[148:156])
    except TarError:
        return False
    if stated == _sum(block[:148]) + _sum(block[156:312]) + _sum(block[312:]) + 8 * 0x20:
        return True
    # Some old programs added signed bytes.
    others = block[:148] + b" " * 8 + block[156:]
    return stated == sum(byte - 256 if byte > 127 else byte for byte in others)


def _sum(data: bytes) -> int:
    """The sum of at most 256 bytes, or of more that are mostly NUL.

    The low half of Adler-32 is that sum plus one, modulo 65521, and ten times as fast as sum().
    """
    return (zlib.adler32(data) & 0xFFFF) - 1


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes) -> int:
    """A numeric field: octal text, or GNU's base-256 (two's complement after the first bit)."""
    if field[0] & 0x80:
        bits = len(field) * 8 - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if value >> (bits - 1) else value
    digits = _text(field.strip(b" \0")).rstrip(b" ")
    if not digits:
        return 0
    if not _OCTAL.fullmatch(digits):
        raise TarError(f"a number in its header is {digits!r}")
    return int(digits, 8)


def _decimal(value: bytes) -> int:
    # int() would also take underscores, signs and spaces, and any length.
    if not value.isdigit() or len(value) > 19:
        raise TarError(f"a number in its PAX header is {value[:40]!r}")
    return int(value)


def _nanoseconds(value: bytes) -> int:
    found = _TIME.fullmatch(value)
    if found is None:
        raise TarError(f"its time is {value[:40]!r}")
    sign, seconds, fraction = found.groups()
    total = int(seconds) * 10**9 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -total if sign else total


def _time(nanoseconds: int) -> bytes:
    """Seconds rounded down, then the fraction to be added: what mkfs.erofs makes of "-2.5"."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    return b"%d.%09d" % (seconds, fraction)
