"""Files to and from an agent, chunk by chunk."""

import hashlib
from typing import Any

from attrs import frozen

from protocol import requests, responses
from protocol.client import AgentClient
from protocol.constants import FILE_WRITE_CHUNK_SIZE
from tests.support.execution import refusal


def sha256(data: bytes) -> str:
    """A digest as the wire has it."""
    return hashlib.sha256(data).hexdigest()


async def write(client: AgentClient, path: str, data: bytes, **fields: Any) -> object:
    """Write a small file, which must succeed; the answer's data."""
    answer = await client.request(requests.FileWrite(path, data, **fields))
    assert isinstance(answer, responses.Ok), answer
    return answer.data


async def begin(client: AgentClient, path: str, size: int, **fields: Any) -> object:
    """Begin an upload, which must succeed; the answer's data."""
    answer = await client.request(requests.FileWriteBegin(path, total_size=size, **fields))
    assert isinstance(answer, responses.Ok), answer
    return answer.data


async def send(client: AgentClient, data: bytes, *, done: bool = False) -> object:
    """Send a chunk, which must succeed; the answer's data."""
    answer = await client.request(requests.FileWriteChunk(data, done=done))
    assert isinstance(answer, responses.Ok), answer
    return answer.data


async def upload(client: AgentClient, path: str, data: bytes, **fields: Any) -> object:
    """Upload a file in chunks of the usual size; the last answer's data."""
    await begin(client, path, len(data), **fields)
    starts = range(0, max(1, len(data)), FILE_WRITE_CHUNK_SIZE)
    for start in starts:
        chunk = data[start : start + FILE_WRITE_CHUNK_SIZE]
        told = await send(client, chunk, done=start == starts[-1])
    return told


@frozen
class Read:
    """A file as it came: its content, the sizes of the chunks, and the last of them."""

    data: bytes
    sizes: list[int]
    last: responses.DataChunk


async def download(client: AgentClient, path: str, **fields: Any) -> Read:
    """Read a file, which must succeed."""
    chunks = []
    async with client.stream(requests.FileRead(path, **fields)) as answers:
        async for answer in answers:
            assert isinstance(answer, responses.DataChunk), answer
            assert not answer.done or not answer.data
            chunks.append(answer)
    data = b"".join(chunk.data for chunk in chunks)
    return Read(data, [len(chunk.data) for chunk in chunks[:-1]], chunks[-1])


async def read(client: AgentClient, path: str, **fields: Any) -> bytes:
    """The content alone."""
    return (await download(client, path, **fields)).data


async def read_refusal(client: AgentClient, path: str, **fields: Any) -> str:
    """The message of the error that reading must end in."""
    error = await refusal(client, requests.FileRead(path, **fields))
    assert error.code == "FILE_IO_FAILED"
    return error.message
