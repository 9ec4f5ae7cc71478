"""Requests that carry the contents of files, either way."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from agent.channel import Channel
from agent.errors import AgentError
from agent.files.behind import Behind, in_thread
from agent.files.download import BLOCK_BYTES, Download
from agent.files.guest_path import GuestPath
from agent.files.quota import within_quotas
from agent.files.reception import receiving
from agent.files.temporary import Site
from agent.files.upload import Plan, Upload, Written
from agent.services import Services
from protocol import AgentResponse, requests, responses
from protocol.errors import ErrorCode


async def file_write(
    request: requests.FileWrite, channel: Channel, services: Services
) -> AgentResponse:
    plan = Plan.of(
        request.path,
        len(request.data),
        mode=request.mode,
        uid=request.uid,
        gid=request.gid,
        sha256=request.sha256,
        digest=request.digest,
        mtime_s=request.mtime_s,
        mtime_ns=request.mtime_ns,
    )
    write = partial(_write, plan, data=request.data)
    return _done(plan, await services.roots.call(request.persistent_overlay_id, write))


async def file_write_begin(
    request: requests.FileWriteBegin, channel: Channel, services: Services
) -> AgentResponse | None:
    plan = Plan.of(
        request.path,
        request.total_size,
        mode=request.mode,
        uid=request.uid,
        gid=request.gid,
        sha256=request.sha256,
        digest=request.digest,
        resume=request.resume,
        mtime_s=request.mtime_s,
        mtime_ns=request.mtime_ns,
    )
    try:
        async with (
            services.roots.opened(request.persistent_overlay_id) as site,
            receiving(plan, site) as reception,
        ):
            await channel.send(
                responses.Ok({"offset": reception.offset} if request.resume else None)
            )
            while (chunk := await next_chunk(channel)) is not None:
                await reception.take(chunk.data)
                if chunk.done:
                    return _done(plan, await reception.finish())
                await channel.send(responses.Ok())
            return None
    finally:
        if request.resume:
            services.roots.expiry_changed()


async def file_write_chunk(
    request: requests.FileWriteChunk, channel: Channel, services: Services
) -> AgentResponse:
    raise AgentError(
        ErrorCode.INVALID_REQUEST,
        "file_write_chunk: no upload is open here; begin one with file_write_begin",
    )


async def file_read(
    request: requests.FileRead, channel: Channel, services: Services
) -> AgentResponse:
    path = GuestPath.of_file(request.path)
    async with services.roots.opened(request.persistent_overlay_id) as site:
        with ExitStack() as stack:
            download = await in_thread(
                lambda: stack.enter_context(
                    Download.opened(
                        site.root,
                        path,
                        offset=request.offset or 0,
                        length=request.length,
                        digest=request.digest,
                    )
                )
            )
            channel.widen()
            first = await in_thread(download.read)
            if channel.sends_in_pieces and len(first) == BLOCK_BYTES:
                await channel.send_each(_chunks(first, download.read))
            elif first:
                await _send_chunks(first, download.read, channel)
    sent = download.size if request.digest else None
    return responses.DataChunk(b"", done=True, sha256=download.sha256, size=sent)


async def _send_chunks(first: bytes, read: Callable[[], bytes], channel: Channel) -> None:
    """Send ``first``, and what is read after it, always one ahead."""
    block: bytes | None = first
    async with Behind[bytes]() as reader:
        while block:
            reader.start(read)
            await channel.send(responses.DataChunk(block, done=False))
            block = await reader.finish()


def _chunks(first: bytes, read: Callable[[], bytes]) -> Generator[AgentResponse]:
    """The same, for the thread that sends them."""
    block = first
    with ThreadPoolExecutor(1) as reader:
        while block:
            following = reader.submit(read)
            yield responses.DataChunk(block, done=False)
            block = following.result()


def _write(plan: Plan, site: Site, data: bytes) -> Written:
    # Privileges are given up once for all of it.
    with within_quotas():
        upload = Upload.begin(plan, site)
        try:
            upload.write(data)
            return upload.finish()
        finally:
            upload.close()


def _done(plan: Plan, written: Written) -> responses.Ok:
    if not plan.has_digest:
        return responses.Ok()
    return responses.Ok({"sha256": written.sha256, "size": written.size})


async def next_chunk(channel: Channel) -> requests.FileWriteChunk | None:
    """The next one, or None: something else came, or nothing more will."""
    kinds = (requests.FileWriteChunk, requests.Stdin, requests.Resize)
    while (message := await channel.follow_up(*kinds)) is not None:
        if isinstance(message, requests.FileWriteChunk):
            return message
    return None
