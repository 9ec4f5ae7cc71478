"""How long the agent takes from exec until it listens, has answered, and has everything up.

Both sides run on the image's own Python inside the image's tree, in a private mount namespace,
natively. The reference is that Python starting and doing nothing. Everything is up when the agent
rings at its host's doorbell; there is no network to be configured here.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from protocol import FrameDecoder, encode, encode_frame, requests

PYTHON = ("/usr/bin/python3", "-I", "-S")
LAUNCHER = "/usr/lib/innkeep/run_agent.py"
ROUNDS = 15
DOORBELL_PORT = 6004
PING = encode_frame(encode(requests.Ping()))


@attrs.frozen
class Start:
    """One start, in milliseconds from exec."""

    listening_ms: float
    first_pong_ms: float
    up_ms: float
    up_cpu_ms: float
    """Processor time, by then."""
    resident_mib: float
    """Likewise."""


@contextmanager
def tree_with_scratch(rootfs: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A directory that the image's tree sees as /tmp, and the command that enters the tree."""
    with tempfile.TemporaryDirectory() as scratch:
        script = (
            'mount --bind "$1" "$2/tmp" && mount -t proc proc "$2/proc" && '
            'shift && root=$1 && shift && exec chroot "$root" "$@"'
        )
        namespace = ("unshare", "--mount", "--propagation", "private")
        yield Path(scratch), (*namespace, "sh", "-ec", script, "sh", scratch, str(rootfs))


def start_bare_python(enter: tuple[str, ...]) -> float:
    """Milliseconds that the reference takes, the entering of the tree included."""
    begun = time.perf_counter()
    subprocess.run([*enter, *PYTHON, "-c", "pass"], check=True)
    return (time.perf_counter() - begun) * 1000


def start_nothing(enter: tuple[str, ...]) -> float:
    """Milliseconds that entering the tree takes, to be taken off the others."""
    begun = time.perf_counter()
    subprocess.run([*enter, "/usr/bin/true"], check=True)
    return (time.perf_counter() - begun) * 1000


def start_agent(scratch: Path, enter: tuple[str, ...], entering_ms: float) -> Start:
    """Start the agent once and end it; connects as a host does that probes a booting VM."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    inside = Path("/tmp") / folder.name
    command = [*enter, *PYTHON, LAUNCHER, "--listen", f"unix:{inside}/socket"]
    command += ["--storage", f"{inside}/storage", "--run-dir", f"{inside}/run"]
    command += ["--host-sockets", f"{inside}/host"]
    (folder / "storage").mkdir()
    with socket.socket(socket.AF_UNIX) as doorbell:
        doorbell.bind(str(folder / f"host_{DOORBELL_PORT}"))
        doorbell.listen()
        return _measured(command, str(folder / "socket"), doorbell, entering_ms)


def _measured(
    command: list[str], address: str, doorbell: socket.socket, entering_ms: float
) -> Start:
    begun = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as agent:
        try:
            with socket.socket(socket.AF_UNIX) as host:
                while host.connect_ex(address) != 0:
                    if agent.poll() is not None:
                        raise RuntimeError(f"the agent ended with status {agent.returncode}")
                    # A tenth of what is measured; a host has nothing better than to try again.
                    time.sleep(0.0005)
                listening = time.perf_counter()
                host.sendall(PING)
                decoder = FrameDecoder()
                while decoder.next_frame() is None:
                    decoder.receive_data(host.recv(4096))
                pong = time.perf_counter()
            doorbell.accept()[0].close()
            up = time.perf_counter()
            up_cpu_ms = _cpu_ms(agent.pid)
            resident_mib = _resident_mib(agent.pid)
        finally:
            agent.terminate()
    listening_ms, pong_ms, up_ms = (
        (at - begun) * 1000 - entering_ms for at in (listening, pong, up)
    )
    return Start(listening_ms, pong_ms, up_ms, up_cpu_ms, resident_mib)


def _cpu_ms(pid: int) -> float:
    """What all threads of a process have used, also those that have ended."""
    # clock_getcpuclockid(3), which Python does not have: CPUCLOCK_SCHED of the process.
    return time.clock_gettime((~pid << 3) | 2) * 1000


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(line for line in lines if line.startswith("VmRSS:"))
    return int(resident.split()[1]) / 1024


def measure(rootfs: Path) -> None:
    """Print the medians, interleaved with the reference."""
    with tree_with_scratch(rootfs) as (scratch, enter):
        rounds = []
        for _ in range(ROUNDS):
            entering_ms = start_nothing(enter)
            bare_ms = start_bare_python(enter) - entering_ms
            rounds.append((bare_ms, start_agent(scratch, enter, entering_ms)))
    starts = [start for _, start in rounds]
    bare = statistics.median(bare_ms for bare_ms, _ in rounds)
    print(f"bare interpreter              {bare:6.1f} ms")
    for name, times in (
        ("listening", [start.listening_ms for start in starts]),
        ("first pong", [start.first_pong_ms for start in starts]),
        ("everything up", [start.up_ms for start in starts]),
    ):
        median = statistics.median(times)
        print(f"exec to {name:21} {median:6.1f} ms   {median / bare:5.2f} times bare")
    cpu = statistics.median(start.up_cpu_ms for start in starts)
    resident = statistics.median(start.resident_mib for start in starts)
    print(f"processor time until then     {cpu:6.1f} ms")
    print(f"resident then                 {resident:6.1f} MiB")
