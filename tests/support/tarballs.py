"""Tars entry by entry, also such as no program writes."""

import io
import tarfile
from collections.abc import Callable

Edit = Callable[[bytearray], None]


def entry(
    name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, **fields: object
) -> bytes:
    """One entry with its content, without an archive's end; `fields` are tarfile.TarInfo's."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
    return header + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def directory(name: str, mode: int = 0o755, **fields: object) -> bytes:
    return entry(name, kind=tarfile.DIRTYPE, mode=mode, **fields)


def symlink(name: str, target: str) -> bytes:
    return entry(name, kind=tarfile.SYMTYPE, linkname=target, mode=0o777)


def hard_link(name: str, target: str, **fields: object) -> bytes:
    return entry(name, kind=tarfile.LNKTYPE, linkname=target, **fields)


def tarball(*entries: bytes) -> bytes:
    """An archive of entries."""
    return b"".join(entries) + bytes(2 * tarfile.BLOCKSIZE)


def edited(entry: bytes, edit: Edit) -> bytes:
    """The entry with its (first) header changed, and with the checksum that is then right."""
    header = bytearray(entry[: tarfile.BLOCKSIZE])
    edit(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + entry[tarfile.BLOCKSIZE :]


def with_field(entry: bytes, start: int, value: bytes) -> bytes:
    """The entry with some bytes of its header replaced."""

    def edit(header: bytearray) -> None:
        header[start : start + len(value)] = value

    return edited(entry, edit)


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    """What Python's tarfile reads in an archive, the last of each name."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar}


def content(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()
