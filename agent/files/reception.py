"""An upload whose bytes come in chunks, written while the next one is on its way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from agent.files.behind import Behind, in_thread
from agent.files.temporary import Site
from agent.files.upload import Plan, Upload, Written

# So that the last sync of a long upload has little to do: a host waits 30 s for an answer.
_FLUSHED_BYTES = 32 * 1024 * 1024


class Reception:
    """Takes the chunks of one upload. Made by ``receiving``."""

    def __init__(self, upload: Upload, size: int, writer: Behind[None], flusher: Behind[None]):
        self._upload = upload
        self._size = size
        self._taken = upload.received
        self._unflushed = 0
        self._writer = writer
        self._flusher = flusher

    @property
    def offset(self) -> int:
        """Bytes that have come already, those of earlier attempts included."""
        return self._taken

    async def take(self, data: bytes) -> None:
        """Take the next bytes. They are being written when this returns, and those before them
        have been: what failed is raised now, and ends the upload.

        Raises:
            AgentError: INVALID_REQUEST for more than was announced; FILE_IO_FAILED.
        """
        await self._writer.finish()
        if self._taken + len(data) > self._size:
            raise self._upload.overrun(self._taken + len(data))
        self._taken += len(data)
        self._writer.start(self._upload.write, data)
        self._unflushed += len(data)
        if self._unflushed > _FLUSHED_BYTES:
            self._unflushed = 0
            await self._flusher.finish()
            self._flusher.start(self._upload.flush)

    async def finish(self) -> Written:
        """Wait for all of it, and put it in its place.

        Raises:
            AgentError: INVALID_REQUEST for less than was announced; FILE_IO_FAILED.
        """
        await self._writer.finish()
        await self._flusher.finish()
        return await in_thread(self._upload.finish)


@asynccontextmanager
async def receiving(plan: Plan, site: Site) -> AsyncIterator[Reception]:
    """Receive one upload during the block. However that is left, nothing remains of one that was
    not finished, but for what can be resumed.

    Raises:
        AgentError: FILE_IO_FAILED.
    """
    upload = await in_thread(Upload.begin, plan, site)
    try:
        async with Behind[None]() as writer, Behind[None]() as flusher:
            yield Reception(upload, plan.size, writer, flusher)
    finally:
        with trio.CancelScope(shield=True):
            await in_thread(upload.close)
