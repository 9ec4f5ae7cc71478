"""Files and directories on their way out of the VM."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, cast

import attrs
import trio

from protocol import decode_value, requests, responses
from protocol.cli.blocks import BlockReader, open_blocks
from protocol.cli.connection import FAILED, CommandFailed, first_failure
from protocol.cli.progress import ByteBar
from protocol.cli.streams import write_all
from protocol.cli.unpacking import Unpacking
from protocol.client import AgentClient, expect
from protocol.values import FileInfo

SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""What is asked for, and checked against its digest, at once."""
_BLOCK: Final = 1024 * 1024
_KEPT_BITS: Final = 0o1777
_ALL_BITS: Final = 0o7777


@attrs.frozen(kw_only=True)
class Download:
    """What is kept of what comes; all methods raise AgentRefused and OSError.

    Without ``with_owners`` everything belongs to who runs us.
    """

    client: AgentClient
    overlay: str | None
    with_owners: bool
    bar: ByteBar

    async def stat(self, path: str, *, follow: bool) -> FileInfo:
        """What is at a path in the VM."""
        request = requests.FileStat(path, follow=follow, persistent_overlay_id=self.overlay)
        answer = await self.client.ask(request, responses.Ok)
        return decode_value(answer.data, FileInfo)

    async def file(self, path: str, info: FileInfo, target: Path) -> None:
        """Fetch one file, of which ``info`` is known; it is at ``target`` when it is whole.

        Until then it is in a hidden file beside that, which a later attempt goes on with, as long
        as the file in the VM is the same.

        Raises:
            CommandFailed: it has changed meanwhile, or did not arrive as it was sent.
        """
        self.bar.expect(info.size)
        partial = _partial(path, info, target)
        with os.fdopen(_open_partial(partial), "r+b", buffering=0) as file:
            done = min(file.seek(0, os.SEEK_END), info.size) // SEGMENT_BYTES * SEGMENT_BYTES
            try:
                file.truncate(file.seek(done))
                self.bar.advance(done)
                while done < info.size:
                    got = await self._segment(path, done, file)
                    done += got
                    if got == 0:
                        break
                now = await self.stat(path, follow=True)
                if done != info.size or now != info:
                    raise CommandFailed(f"{path} has changed while it was copied", FAILED)
                self._adopt_attributes(file, info)
            except BaseException:
                # Nothing in it that would be gone on with.
                if done < SEGMENT_BYTES:
                    partial.unlink()
                raise
        partial.replace(target)

    async def _segment(self, path: str, offset: int, file: IO[bytes]) -> int:
        digest = hashlib.sha256()
        request = requests.FileRead(
            path,
            persistent_overlay_id=self.overlay,
            offset=offset,
            length=SEGMENT_BYTES,
            digest=True,
        )
        async with self.client.stream(request) as answers:
            async for answer in answers:
                chunk = expect(answer, responses.DataChunk)
                digest.update(chunk.data)
                file.write(chunk.data)
                self.bar.advance(len(chunk.data))
        if chunk.sha256 != digest.hexdigest():
            raise CommandFailed(f"{path} did not arrive as it was sent; try again", FAILED)
        return file.tell() - offset

    def _adopt_attributes(self, file: IO[bytes], info: FileInfo) -> None:
        descriptor = file.fileno()
        if self.with_owners:
            os.fchown(descriptor, info.uid, info.gid)
        os.fchmod(descriptor, info.mode & (_ALL_BITS if self.with_owners else _KEPT_BITS))
        when = info.mtime_s * 10**9 + info.mtime_ns
        os.utime(descriptor, ns=(when, when))

    async def tree(self, path: str, target: Path, remark: Callable[[str], None]) -> None:
        """Unpack a directory of the VM into one here, which is made if it is not there."""
        unpacking = Unpacking(target, with_owners=self.with_owners, remark=remark)
        request = requests.TarRead(path, persistent_overlay_id=self.overlay)
        with first_failure():
            async with trio.open_nursery() as nursery:
                sender, receiver = open_blocks()
                nursery.start_soon(_unpack, unpacking, receiver)
                async with sender:
                    await self._stream(request, sender.send)

    async def standard_output(self, path: str, name: str, descriptor: int) -> None:
        """Write a file or a directory, as ``name``, to a descriptor as a tar stream."""

        async def write(data: bytes) -> None:
            await write_all(descriptor, data)

        request = requests.TarRead(path, name=name, persistent_overlay_id=self.overlay)
        await self._stream(request, write)

    async def _stream(
        self, request: requests.TarRead, take: Callable[[bytes], Awaitable[object]]
    ) -> None:
        async with self.client.stream(request) as answers:
            async for answer in answers:
                chunk = expect(answer, responses.DataChunk)
                if chunk.data:
                    await take(chunk.data)
                    self.bar.advance(len(chunk.data))


async def _unpack(unpacking: Unpacking, receiver: trio.MemoryReceiveChannel[bytes]) -> None:
    def unpack() -> None:
        with BlockReader(receiver) as stream:
            unpacking.unpack(cast("IO[bytes]", stream))
            # The rest of the last record.
            while stream.read(_BLOCK):
                pass

    async with receiver:
        await trio.to_thread.run_sync(unpack)


def _partial(path: str, info: FileInfo, target: Path) -> Path:
    """Where a file is until it is whole. Those of other files, or of earlier ones, are removed."""
    place = f".innkeep-part-{_short_digest(target.name)}-"
    partial = target.with_name(place + _short_digest(f"{path}\0{info}"))
    for other in target.parent.glob(f"{place}*"):
        if other != partial:
            other.unlink()
    return partial


def _open_partial(partial: Path) -> int:
    """A descriptor of what there is of it, if that is ours, or of a new one, for nobody else to
    read: its mode comes last."""
    with suppress(FileNotFoundError):
        descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1:
            return descriptor
        # In a directory that others write to as well, they may have put it there.
        os.close(descriptor)
        partial.unlink()
    return os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
