"""How long a VM takes from QEMU's start until its agent listens, has answered, has everything up.

The reference is the same image on the same machine, with busybox's shell in the place of init
(``init=/bin/sh``): no Python, and nothing mounted after the root. That shell again, with a Python
that imports the packages which the agent cannot answer without, and nothing of the agent, is the
floor. Rounds are interleaved. Times count from the start of the QEMU process, as /proc has it (10
ms steps), so that boot.py's own start does not flatter the ratio.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol import FrameDecoder, encode, encode_frame, requests

ROUNDS = 3
LIMIT_S = 120
AGENT_PORT = 6000
PROBE_INTERVAL_S = 0.005
PROBE_LIMIT_S = 0.1
MARKER = "a bare shell"
# What the agent logs as it rings at its host's doorbell.
UP = '"ready '
BARE_SHELL = f'init=/bin/sh -- -c "echo {MARKER}; sleep 1000"'
TO_ANSWER = "trio, attrs, cattrs, orjson, pybase64"
BARE_IMPORTS = (
    "init=/bin/sh -- -c \"PYTHONPATH=/usr/lib/innkeep python3 -S -c 'import gc; gc.disable(); "
    f"import {TO_ANSWER}'; echo {MARKER}; sleep 1000\""
)
PING = encode_frame(encode(requests.Ping()))


@contextmanager
def booting(folder: Path, words: str | None = None) -> Iterator[Path]:
    """The image under emulation, coming up; yields its console's file. Ended afterwards."""
    command = [sys.executable, "-m", "initramfs.boot", "--machine=tcg"]
    command += [f"--socket={folder}/vm.sock", f"--console={folder}/console"]
    command += [f"--append={words}"] if words else []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as machine:
        try:
            yield folder / "console"
        finally:
            qemu = _child_named(machine.pid, "qemu-system")
            if words and qemu is not None:
                # A bare shell hears of no shutdown; boot.py cleans up after its machine.
                os.kill(qemu, 9)
            machine.terminate()


def seconds_until(machine: Path, happened: Callable[[], bool]) -> float:
    """Probe until ``happened``; seconds since QEMU's start."""
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing in {LIMIT_S} s; see {machine}")
        time.sleep(PROBE_INTERVAL_S)
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    qemu = _child_named(os.getpid(), "qemu-system")
    assert qemu is not None
    fields = Path(f"/proc/{qemu}/stat").read_text().rpartition(")")[2].split()
    return now - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def boot_to_marker(folder: Path, words: str) -> float:
    """Seconds to a reference's marker on the console; ``words`` are what the kernel is told."""
    with booting(folder, words) as console:
        return seconds_until(
            console, lambda: console.exists() and MARKER in console.read_text(errors="replace")
        )


def boot_to_agent(folder: Path) -> tuple[float, float, float]:
    """Seconds until the agent's port takes a connection, until a ping on it is answered, and until
    storage and network are up as well."""
    with booting(folder) as console:
        host: socket.socket | None = None

        def connected() -> bool:
            nonlocal host
            host = _connect(folder / "vm.sock")
            return host is not None

        listening = seconds_until(console, connected)
        assert host is not None
        with host:
            host.sendall(PING)
            decoder = FrameDecoder()
            while decoder.next_frame() is None:
                data = host.recv(4096)
                if not data:
                    raise ConnectionError(f"the agent hung up; see {console}")
                decoder.receive_data(data)
            answered = seconds_until(console, lambda: True)
        up = seconds_until(console, lambda: UP in console.read_text(errors="replace"))
        return listening, answered, up


def _connect(path: Path) -> socket.socket | None:
    """A connection to the agent through the multiplexed socket; None while nothing listens."""
    host = socket.socket(socket.AF_UNIX)
    # What is asked before the guest has its vsock driver is lost without an answer.
    host.settimeout(PROBE_LIMIT_S)
    try:
        host.connect(str(path))
        host.sendall(b"CONNECT %d\n" % AGENT_PORT)
        line = b""
        while not line.endswith(b"\n"):
            byte = host.recv(1)
            if not byte:
                raise ConnectionError("nothing listens there yet")
            line += byte
    except OSError:
        host.close()
        return None
    host.settimeout(None)
    return host


def _child_named(pid: int, name: str) -> int | None:
    """The pid of the descendant whose program's name begins so, if there is one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in map(int, children):
        if Path(f"/proc/{child}/comm").read_text().startswith(name[:15]):
            return child
        found = _child_named(child, name)
        if found is not None:
            return found
    return None


def measure(rootfs: Path) -> None:
    """Print the medians."""
    shell, imports, starts = [], [], []
    for _ in range(ROUNDS):
        for references, words in ((shell, BARE_SHELL), (imports, BARE_IMPORTS)):
            with tempfile.TemporaryDirectory() as folder:
                references.append(boot_to_marker(Path(folder), words))
        with tempfile.TemporaryDirectory() as folder:
            starts.append(boot_to_agent(Path(folder)))
    bare = statistics.median(shell)
    print(f"bare busybox shell           {bare:7.2f} s")
    floor = statistics.median(imports)
    print(f"that, and packages imported  {floor:7.2f} s    {floor / bare:5.2f} times bare")
    names = ("listening", "first pong", "everything up")
    for name, times in zip(names, zip(*starts, strict=True), strict=True):
        median = statistics.median(times)
        print(f"QEMU's start to {name:13} {median:6.2f} s    {median / bare:5.2f} times bare")
    size = (rootfs.parent / "initramfs.cpio").stat().st_size
    print(f"initramfs                    {size / 1e6:7.1f} MB")
