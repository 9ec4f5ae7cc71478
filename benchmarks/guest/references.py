"""What the agent is compared with: the same on bare trio, as servers in processes of their own.

Run as a program: KIND PATH. It prints a line when it listens at PATH.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybase64
import trio

from agent.session import pong
from benchmarks.guest.connection import EXITED, LENGTH, STARTED
from benchmarks.guest.python import python
from benchmarks.guest.transfer import (
    CHUNK_BYTES,
    DATA_TAIL,
    READ_IN,
    STDIN_HEAD,
    STDOUT_HEAD,
    WRITE_OUT,
)
from protocol import encode, encode_frame

PONG_FRAME = encode_frame(encode(pong()))


async def echo(stream: trio.SocketStream) -> None:
    """A pong for whatever comes: the least that an answer costs."""
    while await stream.receive_some():
        await stream.send_all(PONG_FRAME)


async def copy_output(stream: trio.SocketStream) -> None:
    """For each request a command's stdout, as frames."""
    while await stream.receive_some():
        process = await trio.lowlevel.open_process(WRITE_OUT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        await stream.send_all(encode_frame(STARTED))
        async with process.stdout as output:
            while data := await output.receive_some(CHUNK_BYTES):
                text = pybase64.b64encode(data)
                size = len(STDOUT_HEAD) + len(text) + len(DATA_TAIL)
                await stream.send_all(b"".join((LENGTH.pack(size), STDOUT_HEAD, text, DATA_TAIL)))
        await stream.send_all(encode_frame(EXITED + b"%d}" % await process.wait()))


async def copy_input(stream: trio.SocketStream) -> None:
    """For each request a command, and to its stdin the frames that follow; an empty one ends it."""
    received = bytearray()

    async def next_payload() -> bytes:
        end = LENGTH.size
        while len(received) < end or len(received) < (end := _end_of_frame(received)):
            data = await stream.receive_some(2 * CHUNK_BYTES)
            if not data:
                return b""
            received.extend(data)
        with memoryview(received) as view:
            payload = bytes(view[LENGTH.size : end])
        del received[:end]
        return payload

    async def next_data() -> bytes:
        payload = memoryview(await next_payload())
        return pybase64.b64decode(payload[len(STDIN_HEAD) : -len(DATA_TAIL)], validate=True)

    while await next_payload():
        process = await trio.lowlevel.open_process(READ_IN, stdin=subprocess.PIPE)
        assert process.stdin is not None
        await stream.send_all(encode_frame(STARTED))
        async with process.stdin as feed:
            while data := await next_data():
                await feed.send_all(data)
        await stream.send_all(encode_frame(EXITED + b"%d}" % await process.wait()))


def _end_of_frame(received: bytearray) -> int:
    size: int = LENGTH.unpack_from(received)[0]
    return LENGTH.size + size


KINDS = {function.__name__: function for function in (echo, copy_output, copy_input)}


@contextmanager
def reference(kind: str) -> Iterator[str]:
    """A server of a kind, for the block; the path where it listens."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "socket"))
        command = python("benchmarks.guest.references", kind, path)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                if not server.stdout.readline():
                    raise RuntimeError(f"the reference {kind} did not start")
                yield path
            finally:
                server.kill()


async def serve(kind: str, path: str) -> None:
    """Serve without end."""
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(path)
    sock.listen()
    print("listening", flush=True)
    await trio.serve_listeners(KINDS[kind], [trio.SocketListener(sock)])


if __name__ == "__main__":
    trio.run(serve, sys.argv[1], sys.argv[2])
