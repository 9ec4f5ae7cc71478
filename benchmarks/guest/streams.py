"""The rows of commands that are all output, or all input."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybase64

from benchmarks.guest.connection import EXITED, STARTED, Connection, check, frame
from benchmarks.guest.references import reference
from benchmarks.guest.row import Ratio, Setting, interleaved
from benchmarks.guest.transfer import CHUNK_BYTES, DATA_TAIL, READ_IN, STDOUT_HEAD, WRITE_OUT, ZEROS
from protocol import requests

MIB = 1024 * 1024


def output(setting: Setting) -> Ratio:
    """The speed at which one interactive command's output arrives."""
    total = setting.count(full=1024, quick=64) * MIB
    request = frame(requests.VmExec(command=WRITE_OUT, interactive=True))
    with (
        _zeros(total),
        reference("copy_output") as path,
        Connection() as agent,
        Connection(path) as bare,
    ):

        def receive(connection: Connection) -> float:
            begun = time.perf_counter()
            check(connection.ask(request), STARTED)
            received = _drain(connection)
            if received != total:
                raise RuntimeError(f"{received} bytes arrived instead of {total}")
            return total / 1e6 / (time.perf_counter() - begun)

        rounds = setting.count(full=7, quick=2)
        ours, theirs = interleaved(rounds, lambda: receive(agent), lambda: receive(bare))
    return _row(f"output, {total // MIB} MiB", ours, theirs)


def stdin(setting: Setting) -> Ratio:
    """The speed at which one interactive command is fed."""
    total = setting.count(full=256, quick=32) * MIB
    request = frame(requests.VmExec(command=READ_IN, interactive=True))
    chunk = frame(requests.Stdin(data=bytes(CHUNK_BYTES)))
    end = frame(requests.Stdin(data=b""))
    with (
        reference("copy_input") as path,
        Connection() as agent,
        Connection(path) as bare,
    ):

        def send(connection: Connection) -> float:
            begun = time.perf_counter()
            check(connection.ask(request), STARTED)
            for _ in range(total // CHUNK_BYTES):
                connection.socket.sendall(chunk)
            check(connection.ask(end), EXITED + b"0")
            return total / 1e6 / (time.perf_counter() - begun)

        rounds = setting.count(full=11, quick=2)
        ours, theirs = interleaved(rounds, lambda: send(agent), lambda: send(bare))
    return _row(f"stdin, {total // MIB} MiB", ours, theirs)


def _row(name: str, ours: float, theirs: float) -> Ratio:
    return Ratio(
        name=name,
        ours=ours,
        reference=theirs,
        against="trio loop between pipe and socket",
        unit="MB/s",
        limit=0.8,
        at_least=True,
    )


@contextmanager
def _zeros(total: int) -> Iterator[None]:
    file = Path(ZEROS)
    try:
        with file.open("wb") as zeros:
            zeros.truncate(total)
        yield
    finally:
        file.unlink(missing_ok=True)


def _drain(connection: Connection) -> int:
    """Read frames of stdout until the command has exited; the bytes of data that they held."""
    received = 0
    buffer = memoryview(bytearray(2 * MIB))
    while True:
        payload = connection.receive_into(buffer)
        if payload[: len(STDOUT_HEAD)] != STDOUT_HEAD:
            check(bytes(payload), EXITED + b"0")
            return received
        text = payload[len(STDOUT_HEAD) : -len(DATA_TAIL)]
        # Its last four characters tell how much of the last three bytes there is.
        received += len(text) // 4 * 3 - 3 + len(pybase64.b64decode(text[-4:]))
