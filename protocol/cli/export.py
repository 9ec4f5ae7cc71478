"""A layer's tar, out of the VM into a file or a pipe."""

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from protocol import decode_value, requests, responses
from protocol.cli.connection import FAILED, CommandFailed
from protocol.client import AgentClient, expect
from protocol.values import ImageInfo

STDOUT: Final = "-"
_USAGE: Final = 2
_DIGEST_LENGTH: Final = len("sha256:") + 64


async def export_layer(client: AgentClient, image: str, index: int, target: str) -> None:
    """Write the tar of a layer to a file, which is there whole or not at all, or to stdout for -.

    ``image`` is a config digest, the beginning of one as ``innkeep images`` prints it, or a
    reference. Raises CommandFailed, or AgentRefused.
    """
    if target == STDOUT and sys.stdout.isatty():
        raise CommandFailed("this is a tar and no text: give a file with -o, or a pipe", _USAGE)
    request = requests.ExportLayer(await _config_digest(client, image), index)
    with _opened(target) as file:
        async with client.stream(request) as answers:
            async for answer in answers:
                file.write(expect(answer, responses.DataChunk).data)


async def _config_digest(client: AgentClient, image: str) -> str:
    if image.startswith("sha256:") and len(image) == _DIGEST_LENGTH:
        return image
    answer = await client.ask(requests.ListImages(), responses.Ok)
    start = f"sha256:{image.removeprefix('sha256:')}"
    listed = decode_value(answer.data, tuple[ImageInfo, ...])
    found = {info.digest for info in listed if info.digest.startswith(start)}
    if len(found) > 1:
        raise CommandFailed(f"{image} is the beginning of several images' digests", FAILED)
    if found:
        return found.pop()
    answer = await client.ask(requests.Query(image), responses.Ok)
    return decode_value(answer.data, ImageInfo).digest


@contextmanager
def _opened(target: str) -> Iterator[BinaryIO]:
    if target == STDOUT:
        yield sys.stdout.buffer
        return
    path = Path(target)
    try:
        # A device or a pipe is written to, not replaced.
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as file:
                yield file
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CommandFailed(f"{target}: {error.strerror}", FAILED) from error
