"""A machine of namespaces with an image in its store, and its own Python to measure with in it."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import trio

from initramfs.demo import push_busybox
from initramfs.local_registry import local_registry
from protocol import requests, responses
from protocol.client import expect, open_client

PROJECT = Path(__file__).parents[1]
PATIENCE_S = 30
_UCRED = struct.Struct("3i")

# Whatever ends this process ends boot.py too, and that leaves nothing behind.
_ENDED_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")
_NAMESPACES = ("--mount", "--pid", "--ipc", "--uts", "--cgroup")

# A cgroup of its own, as crun needs one inside the machine's namespace; it goes with the machine.
_CGROUP = "/sys/fs/cgroup/benchmark"
_ENTER_CGROUP = f'mkdir -p {_CGROUP} && echo 0 >{_CGROUP}/cgroup.procs && exec "$@"'
_ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root")


@attrs.frozen
class Machine:
    """The image, booted: its agent's ``address``, and its PID 1 by its number here."""

    init_pid: int
    address: str

    @property
    def agent_pid(self) -> int:
        """The agent's process, by its number here."""
        with socket.socket(socket.AF_UNIX) as host:
            host.connect(self.address.removeprefix("unix:"))
            credentials = host.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid: int = _UCRED.unpack(credentials)[0]
        return pid

    def pull(self, image: str) -> float:
        """Have the agent pull an image; the seconds from request to answer."""
        return trio.run(_pull, self.address, image)

    def run(self, python: list[str]) -> int:
        """Run the image's Python in all of the machine's namespaces; its exit status.

        It ends with the machine, whatever becomes of us.
        """
        return self._run(python, None).returncode

    def output(self, python: list[str]) -> str:
        """The same, and what it prints. Raises RuntimeError if it fails."""
        ran = self._run(python, subprocess.PIPE)
        if ran.returncode:
            raise RuntimeError(f"{python[-1]} failed in the machine")
        return ran.stdout

    def _run(self, python: list[str], stdout: int | None) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--target={self.init_pid}", *_NAMESPACES, "--root", "--wd=/"]
        words = ["/usr/bin/env", "-i", *_ENVIRONMENT, "sh", "-c", _ENTER_CGROUP, "sh", *python]
        return subprocess.run(
            [*enter, *words], stdin=subprocess.DEVNULL, stdout=stdout, text=True, check=False
        )


@contextmanager
def booted_with_image(image_folder: Path) -> Iterator[tuple[Machine, str]]:
    """The image in ``image_folder``, booted for the block, and a small image that it has pulled."""
    with (
        tempfile.TemporaryDirectory(prefix="innkeep-benchmark-") as scratch,
        ExitStack() as stack,
    ):
        folder = Path(scratch)
        # The registry is no part of what is measured, and nobody's to clear away if we are killed.
        with local_registry() as registry:
            image = push_busybox(folder, registry.address)
            machine = stack.enter_context(booted(folder, image_folder, registry.address))
            machine.pull(image)
        yield machine, image


@contextmanager
def booted(folder: Path, image_folder: Path, registry: str) -> Iterator[Machine]:
    """The image in ``image_folder``, booted for the block, with all it keeps in ``folder``.

    It speaks plain HTTP to ``registry``, and has this directory's programs as
    ``/run/host/benchmarks``.
    """
    (folder / "host").mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(__file__).parent, folder / "host/benchmarks", ignore=ignored)
    with _booted(folder, image_folder, registry) as (boot_pid, address):
        yield Machine(_init_below(boot_pid), address)


@contextmanager
def _booted(folder: Path, image_folder: Path, registry: str) -> Iterator[tuple[int, str]]:
    """The process id of boot.py, and the agent's address."""
    argv = [*_ENDED_WITH_US, sys.executable, "-m", "initramfs.boot", "--machine=namespaces"]
    argv += [f"--image={image_folder.absolute()}", f"--socket={folder / 'host/agent.sock'}"]
    argv += [f"--storage={folder / 'storage'}", f"--console={folder / 'console'}"]
    argv += [f"--insecure-registry={registry}"]
    # ^C is for us, who then end the machine in good order.
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, cwd=PROJECT, start_new_session=True
    ) as boot:
        try:
            assert boot.stdout is not None
            line = boot.stdout.readline().decode().strip()
            if not line.startswith("ready "):
                said = (folder / "console").read_text(errors="replace")[-4000:]
                raise RuntimeError(f"the machine did not come up: {said}")
            yield boot.pid, line.removeprefix("ready ")
        finally:
            boot.terminate()
            boot.wait(PATIENCE_S)


async def _pull(address: str, image: str) -> float:
    async with open_client(address) as client:
        begun = time.perf_counter()
        expect(await client.request(requests.Pull(image=image)), responses.Ok)
        return time.perf_counter() - begun


def _init_below(pid: int) -> int:
    """The descendant that is PID 1 where it lives."""
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        status = Path(f"/proc/{child}/status").read_text().splitlines()
        numbers = next(line for line in status if line.startswith("NSpid:")).split()
        if len(numbers) > 2 and numbers[-1] == "1":
            return child
        try:
            return _init_below(child)
        except LookupError:
            continue
    raise LookupError(f"no init below process {pid}")
