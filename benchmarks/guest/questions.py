"""Asking about images, against a ping: METHOD IMAGE ROUNDS

Prints one line of JSON: the medians in seconds, and the length of an answer.
"""

from __future__ import annotations

import json
import sys
from functools import partial

from benchmarks.guest.connection import Connection, check, frame
from benchmarks.guest.row import interleaved, median_duration
from protocol import requests

_AT_ONCE = 100
_LONGEST = 4 << 20


def main() -> None:
    method, image, rounds = sys.argv[1:]
    request = requests.ListImages() if method == "list_images" else requests.Query(image)
    question, ping = frame(request), frame(requests.Ping())
    buffer = memoryview(bytearray(_LONGEST))
    with Connection() as host:

        def ask(message: bytes) -> memoryview:
            host.socket.sendall(message)
            return host.receive_into(buffer)

        answer = bytes(ask(question))
        check(answer, b'{"status":"ok"')
        medians = interleaved(
            int(rounds),
            lambda: median_duration(_AT_ONCE, partial(ask, question)),
            lambda: median_duration(_AT_ONCE, partial(ask, ping)),
        )
        print(json.dumps((*medians, len(answer))))


if __name__ == "__main__":
    main()
