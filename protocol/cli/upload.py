"""Files and directories on their way into the VM."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Final, cast

import attrs
import trio

from protocol import requests, responses
from protocol.cli.archive import Source
from protocol.cli.blocks import BlockWriter, open_blocks
from protocol.cli.connection import first_failure
from protocol.cli.progress import ByteBar
from protocol.cli.streams import read_some
from protocol.client import AgentClient
from protocol.constants import (
    FILE_TRANSFER_MAX_TOTAL,
    FILE_WRITE_CHUNK_SIZE,
    FILE_WRITE_SINGLE_SHOT_MAX,
)

_ROOT: Final = 0
_KEPT_BITS: Final = 0o1777
"""Of a mode without its owner: set-user-ID would be for another user than was meant."""
_ALL_BITS: Final = 0o7777


@attrs.frozen(kw_only=True)
class Upload:
    """Where things go, and what of them is kept; all methods raise AgentRefused and OSError.

    Without ``with_owners`` everything belongs to root there.
    """

    client: AgentClient
    overlay: str | None
    with_owners: bool
    bar: ByteBar

    async def file(self, path: Path, target: str) -> None:
        """Write one file. One that is cut short goes on where it was, the next time.

        The file at ``path`` is followed, if it is a link.
        """
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size > FILE_TRANSFER_MAX_TOTAL:
                # More than an upload may have, and no more than a stream may.
                parent, _, name = target.rpartition("/")
                await self.tree(self.source(path, name, follow=True), parent or "/")
                return
            seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
            mode = stat.S_IMODE(status.st_mode) & (_ALL_BITS if self.with_owners else _KEPT_BITS)
            uid, gid = (status.st_uid, status.st_gid) if self.with_owners else (_ROOT, _ROOT)
            self.bar.expect(status.st_size)
            if status.st_size <= FILE_WRITE_SINGLE_SHOT_MAX:
                data = file.read(FILE_WRITE_SINGLE_SHOT_MAX + 1)
                _check_size(path, len(data), status.st_size)
                request = requests.FileWrite(
                    path=target,
                    data=data,
                    mode=mode,
                    uid=uid,
                    gid=gid,
                    persistent_overlay_id=self.overlay,
                    mtime_s=seconds,
                    mtime_ns=nanoseconds,
                )
                await self.client.ask(request, responses.Ok)
                self.bar.advance(len(data))
                return
            digest = await trio.to_thread.run_sync(hashlib.file_digest, file, "sha256")
            begin = requests.FileWriteBegin(
                path=target,
                mode=mode,
                total_size=status.st_size,
                uid=uid,
                gid=gid,
                persistent_overlay_id=self.overlay,
                sha256=digest.hexdigest(),
                mtime_s=seconds,
                mtime_ns=nanoseconds,
                resume=True,
            )
            begun = await self.client.ask(begin, responses.Ok)
            assert isinstance(begun.data, dict)
            done = file.seek(begun.data["offset"])
            self.bar.advance(done)
            while True:
                data = file.read(min(FILE_WRITE_CHUNK_SIZE, status.st_size - done))
                done += len(data)
                if not data:
                    _check_size(path, done, status.st_size)
                await self._chunk(data, done=done == status.st_size)
                if done == status.st_size:
                    return

    def source(self, path: Path, name: str, *, follow: bool) -> Source:
        """A tree as ``tree`` takes it."""
        return Source(path, name, with_owners=self.with_owners, follow=follow)

    async def tree(self, source: Source, target: str) -> list[str]:
        """Unpack a local tree into a directory; what tar there had to remark."""
        self.bar.expect(await trio.to_thread.run_sync(source.total_bytes))
        with first_failure():
            async with trio.open_nursery() as nursery:
                sender, receiver = open_blocks()
                nursery.start_soon(_pack, source, sender)
                async with receiver:
                    return await self.stream(receiver, target)

    async def standard_input(self, descriptor: int, target: str) -> list[str]:
        """Unpack the tar stream that comes from a descriptor; what tar there had to remark."""

        async def blocks() -> AsyncIterator[bytes]:
            while data := await read_some(descriptor, FILE_WRITE_CHUNK_SIZE):
                yield data

        return await self.stream(blocks(), target)

    async def stream(self, blocks: AsyncIterator[bytes], target: str) -> list[str]:
        """The same of any tar stream."""
        uid, gid = (None, None) if self.with_owners else (_ROOT, _ROOT)
        await self.client.ask(
            requests.TarWrite(target, uid=uid, gid=gid, persistent_overlay_id=self.overlay),
            responses.Ok,
        )
        async for block in blocks:
            await self._chunk(block, done=False)
        done = await self._chunk(b"", done=True)
        assert isinstance(done.data, dict)
        return [str(remark) for remark in done.data["remarks"]]

    async def _chunk(self, data: bytes, *, done: bool) -> responses.Ok:
        answer = await self.client.ask(requests.FileWriteChunk(data, done), responses.Ok)
        self.bar.advance(len(data))
        return answer


async def _pack(source: Source, sender: trio.MemorySendChannel[bytes]) -> None:
    async with sender:
        with BlockWriter(sender) as stream:
            await trio.to_thread.run_sync(source.write, cast("IO[bytes]", stream))


def _check_size(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise OSError(0, "it changed while it was read", str(path))
