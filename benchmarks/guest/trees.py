"""A directory of 5,000 files as a tar stream, in and out, against tar itself: ROW [--quick]

The stream is the same on both sides. Stream and files are in memory (a tmpfs): a disk takes ten
times as long, for both alike, and would hide what the way through the agent costs.
"""

from __future__ import annotations

import io
import random
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.guest.commands import spawn
from benchmarks.guest.connection import Connection, UnexpectedAnswer, check, frame
from benchmarks.guest.row import Ratio, Setting, interleaved
from protocol import requests

FILES = 5_000
MOST_BYTES = 16 * 1024
CHUNK_BYTES = 1024 * 1024
SCRATCH = Path("/tmp/benchmark-trees")
STREAM = Path("/tmp/benchmark-tree.tar")
OK = b'{"status":"ok"'
LAST = b'"done":true'


def tree_in(setting: Setting) -> Ratio:
    """Unpacking a stream."""
    data = STREAM.read_bytes()
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    frames = [frame(requests.FileWriteChunk(chunk, done=False)) for chunk in chunks]
    frames.append(frame(requests.FileWriteChunk(b"", done=True)))
    numbers = iter(range(1_000_000))

    def ours(host: Connection) -> float:
        target = SCRATCH / f"in-{next(numbers)}"
        begin = frame(requests.TarWrite(str(target)))
        with _timed(target) as taken:
            check(host.ask(begin), OK)
            for chunk in frames:
                check(host.ask(chunk), OK)
        return taken[0]

    def reference() -> float:
        target = SCRATCH / f"in-{next(numbers)}"
        with _timed(target) as taken:
            target.mkdir()
            spawn("/usr/bin/tar", "-xf", str(STREAM), "-C", str(target))
        return taken[0]

    with Connection() as host:
        ours(host)
        reference()
        rounds = setting.count(full=15, quick=2)
        mine, theirs = interleaved(rounds, lambda: ours(host), reference)
    return _row(f"{FILES} files in", mine, theirs, "tar -x", limit=1.5)


def tree_out(setting: Setting) -> Ratio:
    """Packing a directory."""
    source = SCRATCH / "out"
    source.mkdir()
    spawn("/usr/bin/tar", "-xf", str(STREAM), "-C", str(source))
    begin = frame(requests.TarRead(str(source)))
    buffer = memoryview(bytearray(2 * CHUNK_BYTES))

    def ours(host: Connection) -> float:
        begun = time.perf_counter()
        host.socket.sendall(begin)
        while True:
            answer = bytes(host.receive_into(buffer)[-64:])
            if LAST in answer:
                return time.perf_counter() - begun
            if b'"done":false}' not in answer:
                raise UnexpectedAnswer(answer.decode(errors="replace"))

    def reference() -> float:
        begun = time.perf_counter()
        spawn("sh", "-c", f"/usr/bin/tar -cf - -C {source} . | cat >/dev/null")
        return time.perf_counter() - begun

    with Connection() as host:
        ours(host)
        reference()
        rounds = setting.count(full=25, quick=2)
        mine, theirs = interleaved(rounds, lambda: ours(host), reference)
    return _row(f"{FILES} files out", mine, theirs, "tar -c | cat >/dev/null", limit=3)


ROWS: Mapping[str, Callable[[Setting], Ratio]] = {"in": tree_in, "out": tree_out}


@contextmanager
def _timed(target: Path) -> Iterator[list[float]]:
    """How long the block takes, after which nothing is left of it."""
    taken: list[float] = []
    begun = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - begun)
    shutil.rmtree(target)


def _row(name: str, ours: float, theirs: float, against: str, *, limit: float) -> Ratio:
    return Ratio(
        name=name,
        ours=ours * 1e3,
        reference=theirs * 1e3,
        against=against,
        unit="ms",
        limit=limit,
    )


def _make_stream() -> None:
    numbers = random.Random(1)
    with tarfile.open(STREAM, "w") as archive:
        for number in range(FILES):
            info = tarfile.TarInfo(f"{number % 100}/{number}")
            info.size = numbers.randrange(MOST_BYTES)
            archive.addfile(info, io.BytesIO(numbers.randbytes(info.size)))


def main() -> int:
    name, *options = sys.argv[1:]
    SCRATCH.mkdir()
    try:
        _make_stream()
        print(ROWS[name](Setting(image="", quick="--quick" in options)), flush=True)
    except (UnexpectedAnswer, OSError, RuntimeError) as error:
        print(f"{name}: not measured: {error}", flush=True)
        return 1
    finally:
        STREAM.unlink(missing_ok=True)
        shutil.rmtree(SCRATCH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
