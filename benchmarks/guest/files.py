"""The rows of files that go in and out."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pybase64

from benchmarks.guest.connection import Connection, check, frame
from benchmarks.guest.row import Ratio, Setting, interleaved
from protocol import requests

MIB = 1024 * 1024
# A tmpfs, so that no disk is measured.
IN_MEMORY = Path("/tmp/benchmark-files")
ON_DISK = Path("/storage/workspace/benchmark-files")
OK = b'{"status":"ok"}'
CHUNK_HEAD, CHUNK_TAIL = b'{"status":"data_chunk","data":"', b'","done":false}'
LAST_CHUNK = b'{"status":"data_chunk","data":"","done":true}'
SMALL_BYTES = 4096


def upload(setting: Setting) -> Ratio:
    """The speed at which a file arrives, each of its chunks answered before the next is sent."""
    total = setting.count(full=256, quick=32)
    path = IN_MEMORY / "file"
    begin = frame(requests.FileWriteBegin(str(path), total_size=total * MIB))
    chunk = frame(requests.FileWriteChunk(bytes(MIB), done=False))
    last = frame(requests.FileWriteChunk(bytes(MIB), done=True))
    text = pybase64.b64encode(bytes(MIB))
    with _directory(IN_MEMORY), Connection() as agent:

        def send() -> float:
            begun = time.perf_counter()
            check(agent.ask(begin), OK)
            for _ in range(total - 1):
                check(agent.ask(chunk), OK)
            check(agent.ask(last), OK)
            return _speed(total, begun)

        def copy() -> float:
            begun = time.perf_counter()
            ours, theirs = socket.socketpair()
            with theirs:
                command = ["dd", f"of={path}", "bs=1M", "iflag=fullblock", "status=none"]
                copier = subprocess.Popen(command, stdin=theirs)
            with ours:
                block = bytes(MIB)
                for _ in range(total):
                    ours.sendall(block)
                    pybase64.b64decode(text, validate=True)
            _succeed(copier)
            return _speed(total, begun)

        rounds = setting.count(full=9, quick=3)
        return _row(f"upload, {total} MiB", *interleaved(rounds, send, copy), at_least=0.5)


def download(setting: Setting) -> Ratio:
    """The speed at which a file is sent."""
    total = setting.count(full=256, quick=32)
    path = IN_MEMORY / "file"
    request = frame(requests.FileRead(str(path)))
    buffer = memoryview(bytearray(2 * MIB))
    with _directory(IN_MEMORY), Connection() as agent:
        path.write_bytes(bytes(total * MIB))

        def receive() -> float:
            begun = time.perf_counter()
            agent.socket.sendall(request)
            received = 0
            while (payload := agent.receive_into(buffer)) != LAST_CHUNK:
                if payload[: len(CHUNK_HEAD)] != CHUNK_HEAD:
                    raise RuntimeError(bytes(payload[:200]).decode())
                received += (len(payload) - len(CHUNK_HEAD) - len(CHUNK_TAIL)) // 4 * 3
            if received < total * MIB:
                raise RuntimeError(f"{received} bytes arrived instead of {total * MIB}")
            return _speed(total, begun)

        def copy() -> float:
            begun = time.perf_counter()
            ours, theirs = socket.socketpair()
            with theirs:
                command = ["dd", f"if={path}", "bs=1M", "status=none"]
                copier = subprocess.Popen(command, stdout=theirs)
            with ours:
                view = buffer[:MIB]
                for _ in range(total):
                    ours.recv_into(view, flags=socket.MSG_WAITALL)
                    pybase64.b64encode(view)
            _succeed(copier)
            return _speed(total, begun)

        rounds = setting.count(full=9, quick=3)
        return _row(f"download, {total} MiB", *interleaved(rounds, receive, copy), at_least=0.6)


def small_files(setting: Setting) -> Ratio:
    """The time that small files take, each written, synced and in its place before the next."""
    files = setting.count(full=1_000, quick=100)
    data = os.urandom(SMALL_BYTES)
    numbers = count()
    with _directory(ON_DISK), Connection() as agent:

        def send() -> float:
            begun = time.perf_counter()
            for _ in range(files):
                check(agent.ask(frame(requests.FileWrite(f"{ON_DISK}/{next(numbers)}", data))), OK)
            return (time.perf_counter() - begun) / files * 1e3

        def write() -> float:
            begun = time.perf_counter()
            for _ in range(files):
                _write(ON_DISK / str(next(numbers)), data)
            return (time.perf_counter() - begun) / files * 1e3

        rounds = setting.count(full=5, quick=3)
        ours, theirs = interleaved(rounds, send, write)
    return Ratio(
        name=f"file_write, {files} of {SMALL_BYTES // 1024} KiB",
        ours=ours,
        reference=theirs,
        against="write, fsync, rename, fsync",
        unit="ms",
        limit=1.6,
    )


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _directory(path: Path) -> Iterator[None]:
    path.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(path)


def _speed(mebibytes: int, begun: float) -> float:
    return mebibytes * MIB / 1e6 / (time.perf_counter() - begun)


def _succeed(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise RuntimeError(f"{process.args!r} failed")


def _row(name: str, ours: float, theirs: float, *, at_least: float) -> Ratio:
    return Ratio(
        name=name,
        ours=ours,
        reference=theirs,
        against="dd through a socketpair, and base64",
        unit="MB/s",
        limit=at_least,
        at_least=True,
    )
