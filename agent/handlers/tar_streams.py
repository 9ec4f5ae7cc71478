"""Requests that carry whole directories, as tar streams."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from agent.channel import Channel
from agent.errors import AgentError
from agent.files.behind import in_thread
from agent.files.failure import failing_on
from agent.files.guest_path import GuestPath, GuestRoot, Owner, closing
from agent.handlers.execution import a_cancellation_is_all
from agent.handlers.files import next_chunk
from agent.processes import tar
from agent.services import Services
from protocol import AgentResponse, requests, responses
from protocol.errors import ErrorCode

_ROOT = 0
_ALL_OF_IT = "."


async def tar_write(
    request: requests.TarWrite, channel: Channel, services: Services
) -> AgentResponse | None:
    path = GuestPath.parse(request.path)
    Owner.of(request.uid, request.gid)  # refuses what no file can have
    owner = None
    if request.uid is not None or request.gid is not None:
        owner = (request.uid or _ROOT, request.gid or _ROOT)
    with a_cancellation_is_all(), _failing_to_start():
        async with (
            services.roots.opened(request.persistent_overlay_id) as site,
            _opened(partial(_made, site.root, path, owner or (_ROOT, _ROOT))) as directory,
            tar.unpacking(
                services.processes, directory, namespace=site.root.namespace, owner=owner
            ) as unpacking,
        ):
            await channel.send(responses.Ok())
            while (chunk := await next_chunk(channel)) is not None:
                await unpacking.feed(chunk.data)
                if chunk.done:
                    return responses.Ok({"remarks": await unpacking.finish()})
                await channel.send(responses.Ok())
            return None


async def tar_read(
    request: requests.TarRead, channel: Channel, services: Services
) -> AgentResponse:
    path = GuestPath.parse(request.path)
    if request.name is not None and (not request.name or "\0" in request.name):
        raise AgentError(ErrorCode.INVALID_REQUEST, "name: it is empty, or holds a NUL byte")
    name = _ALL_OF_IT

    def find() -> int:
        nonlocal name
        directory, name = _found(site.root, path)
        return directory

    async def send(data: bytes) -> None:
        await channel.send(responses.DataChunk(data, done=False))

    with a_cancellation_is_all(), _failing_to_start():
        async with (
            services.roots.opened(request.persistent_overlay_id) as site,
            _opened(find) as directory,
        ):
            called = request.name
            if called is None and name != _ALL_OF_IT:
                called = path.name
            await tar.pack(
                services.processes,
                directory,
                send,
                name=name,
                called=called,
                namespace=site.root.namespace,
            )
    return responses.DataChunk(b"", done=True)


@contextmanager
def _failing_to_start() -> Iterator[None]:
    """What the host asked for was files; a process is how we do it."""
    try:
        yield
    except AgentError as error:
        if error.code is not ErrorCode.SPAWN_FAILED:
            raise
        raise AgentError(ErrorCode.FILE_IO_FAILED, error.message) from error


@asynccontextmanager
async def _opened(open_directory: Callable[[], int]) -> AsyncIterator[int]:
    descriptor = await in_thread(open_directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _made(root: GuestRoot, path: GuestPath, owner: tuple[int, int]) -> int:
    with failing_on("make the directory", path):
        descriptor, _ = root.make_directory(path, Owner(*owner))
        return descriptor


def _found(root: GuestRoot, path: GuestPath) -> tuple[int, str]:
    """The directory at ``path`` and all of it; or that of a file there, and the file's name."""
    with (
        failing_on("read", path, missing=ErrorCode.NOT_FOUND),
        closing(root.open(path, os.O_PATH)) as found,
    ):
        if stat.S_ISDIR(os.fstat(found).st_mode):
            return root.open_directory(path), _ALL_OF_IT
        place = root.path_of(found)
        return root.open_directory(place.parent), place.name
