"""Tar streams, of any entries, also of those that no archiver writes."""

import io
import tarfile
from collections.abc import Iterable

BLOCK = 512
END_MARK = bytes(2 * BLOCK)

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes | None = None, **fields: object) -> Entry:
    """One entry: a file where it has content, else what `fields` of a TarInfo say."""
    info = tarfile.TarInfo(name)
    info.mtime = 1_600_000_000
    if content is not None:
        info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content or b""


def directory(name: str, mode: int = 0o755) -> Entry:
    return entry(name, type=tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> Entry:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str) -> Entry:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def stream(entries: Iterable[Entry]) -> bytes:
    """A whole tar stream of these entries, in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def contents(data: bytes) -> dict[str, bytes | None]:
    """The names in a stream, with the content of those that are files."""
    found: dict[str, bytes | None] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            found[member.name] = None if file is None else file.read()
    return found
