"""Tar streams over the wire, as a host sends and takes them."""

from typing import Any

from protocol import AgentResponse, requests, responses
from protocol.client import AgentClient

CHUNK = 64 * 1024


async def write_tar(
    client: AgentClient, path: str, data: bytes, *, chunk: int = CHUNK, **fields: Any
) -> AgentResponse:
    """Send a whole stream; the last answer."""
    answer = await client.request(requests.TarWrite(path, **fields))
    for start in range(0, len(data), chunk):
        if isinstance(answer, responses.Error):
            return answer
        answer = await client.request(
            requests.FileWriteChunk(data[start : start + chunk], done=False)
        )
    if isinstance(answer, responses.Error):
        return answer
    return await client.request(requests.FileWriteChunk(b"", done=True))


async def read_tar(client: AgentClient, path: str, **fields: Any) -> bytes:
    """A whole stream; it must come to its end."""
    data = bytearray()
    async with client.stream(requests.TarRead(path, **fields)) as answers:
        async for answer in answers:
            assert isinstance(answer, responses.DataChunk), answer
            assert answer.done == (not answer.data)
            data += answer.data
    return bytes(data)
