"""Agents to talk to: the image booted by `initramfs.boot`, or the agent alone as a process."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

from attrs import frozen

from tests.support.commands import CommandError, run
from tests.support.process_tree import arguments, children, descendants, innermost_pid

PROJECT = Path(__file__).parents[2]
PATIENCE_S = 30
LOOPBACK_IN_VM = "10.0.2.2"  # what QEMU's user network calls this machine's loopback


_IN_OWN_NETWORK = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
_ON_LINK = 'nsenter --net="/proc/$0/ns/net" ip link set eth0 netns "$$" && exec "$@"'


@frozen
class Machine:
    """A booted image.

    `address` is for `open_client`, `storage` the directory or disk file that it was given,
    `console` the file that its console goes to, `pid` the process of `initramfs.boot`, and
    `registry_host` the name of this machine's loopback as seen from inside.
    """

    address: str
    pid: int
    storage: Path
    console: Path
    registry_host: str
    _process: "subprocess.Popen[bytes]"

    @property
    def is_vm(self) -> bool:
        """Whether it has a kernel of its own."""
        return not self.address.startswith("unix:")

    def console_text(self) -> str:
        return self.console.read_text(errors="replace")

    def wait(self) -> int:
        """Block until the machine has ended by itself; the status of `initramfs.boot`."""
        return self._process.wait(PATIENCE_S)

    def init_pid(self) -> int:
        """The machine's PID 1, by its number here. Only for machines made of namespaces."""
        return next(pid for pid in descendants(self.pid) if innermost_pid(pid) == 1)

    def agent_pid(self) -> int:
        """The agent's process, by its number here. Only for machines made of namespaces."""
        (pid,) = (
            child
            for child in children(self.init_pid())
            if any(b"agent" in word for word in arguments(child))
        )
        return pid

    def agents_open_files(self) -> int:
        """How many descriptors the agent has open."""
        return sum(1 for _ in Path(f"/proc/{self.agent_pid()}/fd").iterdir())

    def agents_memory_bytes(self) -> int:
        """How much memory the agent has resident."""
        status = Path(f"/proc/{self.agent_pid()}/status").read_text()
        (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(kib) * 1024

    def agents_cpu_s(self) -> float:
        """How much processor time the agent has used since its start (proc_pid_stat(5))."""
        stat = Path(f"/proc/{self.agent_pid()}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    @property
    def enter_network(self) -> tuple[str, ...]:
        """The words before a command of this machine that is to have the other's network."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net")

    def path(self, inside: str) -> Path:
        """A path of this machine for one that is `inside`. Only for machines of namespaces."""
        return Path(f"/proc/{self.init_pid()}/root") / inside.lstrip("/")


@contextmanager
def booted(
    directory: Path,
    *,
    kind: str = "namespaces",
    storage: Path | None = None,
    storage_mib: int | None = None,
    in_memory: bool = False,
    in_own_network: bool = False,
    linked_to: int | None = None,
    insecure_registries: Sequence[str] = (),
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Machine]:
    """Boot the image until the block is left; sockets and console go to `directory`.

    `kind`, `options` and `env` are for `initramfs.boot`. With `storage_mib` the storage
    directory is a file system of that size, seen by the machine only; `in_memory` gives it none.
    `in_own_network`: a machine of namespaces has a loopback of its own, and nothing else; with
    `linked_to` also the eth0 of that process's network (see Router).
    Blocks until the agent has answered a ping. Raises CommandError with the end of the console
    where it does not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    console = directory / "console.log"
    if storage is None:
        storage = directory / "storage"
        storage.mkdir(exist_ok=True)
    argv = [
        *(_on_small_disk(storage, storage_mib) if storage_mib is not None else ()),
        *(_IN_OWN_NETWORK if in_own_network or linked_to is not None else ()),
        *(("sh", "-c", _ON_LINK, str(linked_to)) if linked_to is not None else ()),
        sys.executable,
        "-m",
        "initramfs.boot",
        f"--machine={kind}",
        f"--socket={directory / 'agent.sock'}",
        *([] if in_memory else [f"--storage={storage}"]),
        f"--console={console}",
        *(f"--insecure-registry={address}" for address in insecure_registries),
        *options,
    ]
    with starting(argv, console, storage, kind=kind, env=env) as machine:
        yield machine


@contextmanager
def starting(
    argv: Sequence[str],
    console: Path,
    storage: Path,
    *,
    kind: str = "auto",
    env: Mapping[str, str] | None = None,
) -> Iterator[Machine]:
    """Run until the block is left what prints `ready ADDRESS`, as `initramfs.boot` does, and blocks
    until then. Raises CommandError with the end of the console where that does not come."""
    with _started(argv, env=env) as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode().strip()
        if not line.startswith("ready "):
            process.terminate()
            process.wait(PATIENCE_S)
            said = console.read_text(errors="replace")[-4000:] if console.exists() else ""
            raise CommandError(f"{' '.join(argv)}: printed {line!r}, no `ready`: {said}")
        yield Machine(
            address=line.removeprefix("ready "),
            pid=process.pid,
            storage=storage,
            console=console,
            registry_host="127.0.0.1" if kind == "namespaces" else LOOPBACK_IN_VM,
            process=process,
        )


@contextmanager
def agent_alone(
    directory: Path,
    *,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[Machine]:
    """Run `python -m agent` natively on a unix socket, without the image, for the block.

    Yields when its log says that it serves; raises CommandError with the log where it ends before.
    """
    directory.mkdir(parents=True, exist_ok=True)
    storage = directory / "storage"
    storage.mkdir(exist_ok=True)
    console = directory / "console.log"
    address = f"unix:{directory / 'agent.sock'}"
    argv = [
        sys.executable,
        "-m",
        "agent",
        f"--listen={address}",
        f"--storage={storage}",
        f"--run-dir={directory / 'run'}",
        *options,
    ]
    serving: Future[None] = Future()
    # The thread closes what it reads, and nobody closes it under it: the log ends when all do who
    # write to it, and some outlive the agent.
    log, writer = os.pipe()
    Thread(target=_copy_log, args=(log, console, serving), daemon=True).start()
    with ExitStack() as stack:
        try:
            process = stack.enter_context(_started(argv, stderr=writer, env=env))
        finally:
            os.close(writer)
        serving.result()
        yield Machine(
            address=address,
            pid=process.pid,
            storage=storage,
            console=console,
            registry_host="127.0.0.1",
            process=process,
        )


def _on_small_disk(directory: Path, mib: int) -> list[str]:
    """The words before a command that is to find a file system of its own there."""
    disk = directory.with_name(f"{directory.name}.ext4")
    with disk.open("wb") as file:
        file.truncate(mib << 20)
    run("mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", disk)
    # The loop device goes with the mount, and that with the last process of the namespace.
    mount = f'mount -o loop "{disk}" "{directory}" && exec "$@"'
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", mount, "sh"]


@contextmanager
def _started(
    argv: Sequence[str], *, stderr: int | None = None, env: Mapping[str, str] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a program for the block; SIGTERM and, after a while, SIGKILL end it."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=PROJECT,
        env=None if env is None else {**os.environ, **env},
        # ^C in a test run is for pytest, which then ends the machine in good order.
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _copy_log(log: int, copy: Path, serving: "Future[None]") -> None:
    with open(log, "rb") as lines, copy.open("ab", buffering=0) as file:
        for line in lines:
            file.write(line)
            if b"serving on" in line and not serving.done():
                serving.set_result(None)
    if not serving.done():
        said = copy.read_text(errors="replace")
        serving.set_exception(CommandError(f"the agent ended before it served: {said}"))
