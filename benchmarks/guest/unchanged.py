"""Pulling a tag that has not moved, against one request to the registry: REGISTRY TAG ROUNDS

Prints one line of JSON: the medians in seconds. A host's connection is kept; the reference makes a
session for each request, as a pull does, in a process that has imported all it needs.
"""

from __future__ import annotations

import json
import sys
import time

import requests

from benchmarks.guest.connection import Connection, UnexpectedAnswer, frame
from benchmarks.guest.row import interleaved
from benchmarks.guest.stages import OCI_MANIFEST
from protocol.requests import Pull

_LAST = b'{"status":"ok"'


def main() -> None:
    registry, tag, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    request = frame(Pull(image=f"{registry}/benchmark:{tag}"))
    url = f"http://{registry}/v2/benchmark/manifests/{tag}"
    with Connection() as host:

        def ours() -> float:
            begun = time.perf_counter()
            answer = host.ask(request)
            taken = time.perf_counter() - begun
            if not answer.startswith(_LAST):
                raise UnexpectedAnswer(answer[:200].decode(errors="replace"))
            return taken

        def reference() -> float:
            begun = time.perf_counter()
            with requests.Session() as session:
                session.head(url, headers={"Accept": OCI_MANIFEST}).raise_for_status()
            return time.perf_counter() - begun

        ours()
        reference()
        print(json.dumps(interleaved(rounds, ours, reference)))


if __name__ == "__main__":
    main()
