"""Hosts that read what their commands write, as fast as it comes.

Run as a program: COUNT. It prints a line when all of them have received output, and when its own
stdin ends, how many MB of frames they got a second.
"""

from __future__ import annotations

import select
import sys
import time
from contextlib import ExitStack

from benchmarks.guest.connection import STARTED, Connection, check, frame
from protocol import requests

YES = frame(requests.VmExec(command=("yes",), interactive=True))
BUFFER_BYTES = 1024 * 1024


def main() -> None:
    count = int(sys.argv[1])
    with ExitStack() as stack:
        hosts = [stack.enter_context(Connection()) for _ in range(count)]
        for host in hosts:
            check(host.ask(YES), STARTED)
        ready = select.epoll()
        sockets = {host.socket.fileno(): host.socket for host in hosts}
        for descriptor in (0, *sockets):
            ready.register(descriptor, select.EPOLLIN)
        buffer = bytearray(BUFFER_BYTES)
        silent = set(sockets)
        begun, received = time.monotonic(), 0
        while True:
            for descriptor, _ in ready.poll():
                if descriptor == 0:
                    print(received / 1e6 / (time.monotonic() - begun), flush=True)
                    return
                received += sockets[descriptor].recv_into(buffer)
                if descriptor in silent:
                    silent.remove(descriptor)
                    if not silent:
                        print("all stream", flush=True)
                        begun, received = time.monotonic(), 0


if __name__ == "__main__":
    main()
