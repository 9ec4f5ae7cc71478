"""A machine of namespaces with an image in its store, and its own Python to measure with in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
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

# Whatever ends this process ends boot.py too, and that leaves nothing behind.
_ENDED_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")
_NAMESPACES = ("--mount", "--pid", "--ipc", "--uts", "--cgroup")

# A cgroup of its own, as crun needs one inside the machine's namespace; it goes with the machine.
_CGROUP = "/sys/fs/cgroup/benchmark"
_ENTER_CGROUP = f'mkdir -p {_CGROUP} && echo 0 >{_CGROUP}/cgroup.procs && exec "$@"'
_ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root")


@attrs.frozen
class Machine:
    """The image, booted; ``init_pid`` is its PID 1 by its number here, ``image`` in its store."""

    init_pid: int
    image: str

    def run(self, python: list[str]) -> int:
        """Run the image's Python in all of the machine's namespaces; its exit status.

        It ends with the machine, whatever becomes of us.
        """
        enter = ["nsenter", f"--target={self.init_pid}", *_NAMESPACES, "--root", "--wd=/"]
        words = ["/usr/bin/env", "-i", *_ENVIRONMENT, "sh", "-c", _ENTER_CGROUP, "sh", *python]
        return subprocess.run([*enter, *words], stdin=subprocess.DEVNULL, check=False).returncode


@contextmanager
def booted_with_image(image_folder: Path) -> Iterator[Machine]:
    """The image in ``image_folder``, booted for the block, having pulled a small one of busybox.

    The machine has this directory's programs as ``/run/host/benchmarks``.
    """
    with (
        tempfile.TemporaryDirectory(prefix="innkeep-benchmark-") as scratch,
        ExitStack() as machine,
    ):
        folder = Path(scratch)
        (folder / "host").mkdir()
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(__file__).parent, folder / "host/benchmarks", ignore=ignored)
        # The registry is no part of what is measured, and nobody's to clear away if we are killed.
        with local_registry() as registry:
            image = push_busybox(folder, registry.address)
            booted = _booted(folder, image_folder, registry.address)
            boot_pid, address = machine.enter_context(booted)
            trio.run(_pull, address, image)
        yield Machine(_init_below(boot_pid), image)


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


async def _pull(address: str, image: str) -> None:
    async with open_client(address) as client:
        expect(await client.request(requests.Pull(image=image)), responses.Ok)


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
