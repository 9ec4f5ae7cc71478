"""Exporting an image's largest layer, against its blob's decompression: DIGEST FORM ROUNDS LAYER…

Prints one line of JSON: the medians in MB of the tar a second, and its length. LAYER are the blobs'
digests, FORM is gzip or zstd. The reference is the agent's own decompression, and one processor.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pybase64

from agent.images.decompression import Decompression
from benchmarks.guest.connection import Connection, UnexpectedAnswer, frame
from benchmarks.guest.row import interleaved
from protocol.constants import LAYER_CHUNK_SIZE
from protocol.requests import ExportLayer

BLOBS = Path("/storage/oci/blobs/sha256")
BLOCK = 256 << 10
HEAD = b'{"status":"data_chunk","data":"'
MORE, LAST = b'","done":false}', b'","done":true}'


def main() -> None:
    digest, form, rounds, *layers = sys.argv[1:]
    blobs = [BLOBS / layer.removeprefix("sha256:") for layer in layers]
    blob = max(blobs, key=lambda path: path.stat().st_size)
    request = frame(ExportLayer(digest, blobs.index(blob)))
    buffer = memoryview(bytearray(LAYER_CHUNK_SIZE * 2))
    size = 0
    with Connection() as host:

        def ours() -> float:
            nonlocal size
            begun = time.perf_counter()
            host.socket.sendall(request)
            size = _drain(host, buffer)
            return size / 1e6 / (time.perf_counter() - begun)

        def reference() -> float:
            begun = time.perf_counter()
            total = _decompress(blob, form)
            return total / 1e6 / (time.perf_counter() - begun)

        ours()
        print(json.dumps((*interleaved(int(rounds), ours, reference), size)))


def _drain(host: Connection, buffer: memoryview) -> int:
    """The bytes of data that came, all of them read and none looked at."""
    received = 0
    while True:
        payload = host.receive_into(buffer)
        if payload[: len(HEAD)] != HEAD:
            raise UnexpectedAnswer(bytes(payload[:200]).decode(errors="replace"))
        if payload[-len(LAST) :] == LAST:
            return received
        text = payload[len(HEAD) : -len(MORE)]
        # Its last four characters tell how much of the last three bytes there is.
        received += len(text) // 4 * 3 - 3 + len(pybase64.b64decode(text[-4:]))


def _decompress(blob: Path, form: str) -> int:
    decompression = Decompression(f"application/vnd.oci.image.layer.v1.tar+{form}")
    total = 0
    with blob.open("rb", buffering=0) as file:
        while data := file.read(BLOCK):
            total += sum(map(len, decompression.feed(data)))
    return total + sum(map(len, decompression.finish()))


if __name__ == "__main__":
    main()
