"""What it costs to have the agent write and read files, instead of doing it oneself."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.guest.files import CHUNK_HEAD, CHUNK_TAIL, LAST_CHUNK
from benchmarks.guest.row import Ratio, interleaved
from benchmarks.guest.table import FILES
from benchmarks.processes import measure_in_machine
from protocol import AgentRequest, AgentResponse, decode, encode, encode_frame, requests, responses

IN_VM = "vm-download"
ROWS = (*FILES, IN_VM)

MIB = 1024 * 1024
AGENT_PORT = 6000
RAW_PORT = 7000
RECEIVED_BYTES = 256 * 1024
PATIENCE_S = 120

# Who connects is sent so many bytes, with the sends that the agent makes on vsock.
SERVE = """
import socket, sys
listener = socket.socket(socket.AF_VSOCK)
listener.bind((socket.VMADDR_CID_ANY, int(sys.argv[1])))
listener.listen()
print("listening", flush=True)
while True:
    peer, _ = listener.accept()
    with peer:
        for _ in range(int(sys.argv[2]) // 32768):
            peer.sendall(bytes(32768))
        peer.recv(1)
"""


def measure(rootfs: Path, rows: Sequence[str] = (), *, quick: bool = False) -> None:
    """Print the table, or the named rows; ``quick`` is for trying, its figures mean little."""
    native = [row for row in rows or ROWS if row != IN_VM]
    if native:
        measure_in_machine(rootfs, native, quick=quick)
    if len(native) < len(rows or ROWS):
        print(vm_download(rootfs.parent, quick=quick), flush=True)


def vm_download(image_folder: Path, *, quick: bool) -> Ratio:
    """The speed at which a file leaves a VM, and that of its vsock in the same boot."""
    total = 8 if quick else 32
    with (
        tempfile.TemporaryDirectory() as folder,
        _booted(Path(folder), image_folder) as path,
        _connected(path, AGENT_PORT) as agent,
        _connected(path, AGENT_PORT) as server,
    ):
        script = f"head -c {total * MIB} /dev/zero >/tmp/file"
        _ask(agent, requests.VmExec(("sh", "-c", script)))
        command = ("/usr/bin/python3", "-c", SERVE, str(RAW_PORT), str(total * MIB))
        _ask(server, requests.VmExec(command, interactive=True))
        if not isinstance(_receive(server), responses.Stdout):
            raise RuntimeError("nobody serves in the VM")
        request = encode_frame(encode(requests.FileRead("/tmp/file")))
        buffer = memoryview(bytearray(2 * MIB))

        def download() -> float:
            begun = time.perf_counter()
            agent.sendall(request)
            received = 0
            # As natively, frames are received and not decoded, which would be the host's time.
            while (payload := _receive_into(agent, buffer)) != LAST_CHUNK:
                if payload[: len(CHUNK_HEAD)] != CHUNK_HEAD:
                    raise RuntimeError(bytes(payload[:200]).decode())
                received += (len(payload) - len(CHUNK_HEAD) - len(CHUNK_TAIL)) // 4 * 3
            if received < total * MIB:
                raise RuntimeError(f"{received} bytes arrived instead of {total * MIB}")
            return _speed(total * MIB, begun)

        def receive() -> float:
            with _connected(path, RAW_PORT) as raw:
                begun = time.perf_counter()
                left = total * MIB
                while left:
                    left -= len(raw.recv(min(left, RECEIVED_BYTES)))
                return _speed(total * MIB, begun)

        ours, theirs = interleaved(2 if quick else 5, download, receive)
    return Ratio(
        name=f"download from a VM, {total} MiB",
        ours=ours,
        reference=theirs,
        against="bare vsock in the same boot",
        unit="MB/s",
        limit=0.5,
        at_least=True,
    )


@contextmanager
def _booted(folder: Path, image_folder: Path) -> Iterator[Path]:
    """A VM under emulation; the socket that leads to its vsock."""
    argv = [sys.executable, "-m", "initramfs.boot", "--machine=tcg"]
    argv += [f"--image={image_folder.absolute()}", f"--socket={folder}/vm.sock"]
    argv += [f"--console={folder}/console"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as boot:
        try:
            assert boot.stdout is not None
            if not boot.stdout.readline().startswith(b"ready "):
                raise RuntimeError("the VM did not come up")
            yield folder / "vm.sock"
        finally:
            boot.terminate()


@contextmanager
def _connected(path: Path, port: int) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(PATIENCE_S)
        host.connect(str(path))
        host.sendall(b"CONNECT %d\n" % port)
        while host.recv(1) != b"\n":
            pass
        yield host


def _ask(host: socket.socket, request: AgentRequest) -> AgentResponse:
    host.sendall(encode_frame(encode(request)))
    return _receive(host)


def _receive(host: socket.socket) -> AgentResponse:
    (size,) = struct.unpack(">I", _exactly(host, 4))
    answer: AgentResponse = decode(bytes(_exactly(host, size)), AgentResponse).body
    if isinstance(answer, responses.Error):
        raise RuntimeError(answer.message)
    return answer


def _receive_into(host: socket.socket, buffer: memoryview) -> memoryview:
    (size,) = struct.unpack(">I", _exactly(host, 4))
    _fill(host, buffer[:size])
    return buffer[:size]


def _exactly(host: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    _fill(host, memoryview(buffer))
    return buffer


def _fill(host: socket.socket, left: memoryview) -> None:
    while left:
        got = host.recv_into(left)
        if not got:
            raise RuntimeError("the VM hung up")
        left = left[got:]


def _speed(size: int, begun: float) -> float:
    return size / 1e6 / (time.perf_counter() - begun)
