"""`make run`: from nothing to a container in a microVM, one step at a time, with the clock running.

Boots the image, pulls a small image made on the spot (or the one that is asked for) inside the
machine, runs a command in it and powers off. The exit status is the command's.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import frozen

from initramfs.local_registry import RegistryError, local_registry

LOOPBACK_IN_VM = "10.0.2.2"
GREETING = ["sh", "-c", "echo Hello from a container; uname -srm; ls"]
TOOLS = {"busybox": "busybox-static", "skopeo": "skopeo", "umoci": "umoci"}
PATIENCE_S = 30


class DemoError(RuntimeError):
    """A step did not work; the text is for whoever typed `make run`."""


@frozen
class Guest:
    """A booted machine: where to reach it, and its name for this one's loopback, if another."""

    address: str
    loopback: str | None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    # SIGTERM unwinds like ^C, so that neither the machine nor the registry is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    try:
        status = _demonstrate(arguments)
    except (DemoError, RegistryError) as error:
        print(f"\ninnkeep: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninnkeep: stopped; the machine and the registry are gone", file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - begun:.1f} s, exit status {status}.")
    return status


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m initramfs.demo", description=__doc__)
    parser.add_argument(
        "--machine", default="auto", help="as for initramfs.boot: auto, kvm, tcg or namespaces"
    )
    parser.add_argument(
        "--image", default="", metavar="REFERENCE", help="an image to run instead of our own"
    )
    parser.add_argument("command", nargs="*", help="what to run in it, after `--`")
    return parser.parse_args(argv)


def _demonstrate(arguments: argparse.Namespace) -> int:
    """Do all the steps; the exit status of the command in the container."""
    command = arguments.command
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="innkeep-demo-")))
        if arguments.image:
            image = _Image(arguments.image)
        else:
            with _step("A registry on loopback, with an image made of Debian's busybox"):
                server = stack.enter_context(local_registry())
                image = _Image(push_busybox(directory, server.address))
            command = command or GREETING
        kind = "machine of namespaces" if arguments.machine == "namespaces" else "microVM"
        with _step(f"A {kind} boots, and its agent answers"):
            guest = stack.enter_context(_booted(directory, arguments.machine, image))
        reference = image.seen_from(guest)
        with _step(f"The machine pulls {reference}"):
            pulled = _innkeep(guest, "pull", reference)
        if pulled != 0:
            raise DemoError(f"{reference} could not be pulled")
        with _step(f"A container runs {shlex.join(command) or 'what the image says'}"):
            status = _innkeep(guest, "run", reference, "--", *command)
        with _step("The machine powers off"):
            _innkeep(guest, "shutdown")
            stack.close()
    return status


@frozen
class _Image:
    reference: str

    @property
    def loopback_registry(self) -> str | None:
        """`host:port` of a registry on this machine's loopback, which speaks plain HTTP."""
        registry = self.reference.partition("/")[0]
        host = registry.partition(":")[0]
        return registry if host in ("localhost", "127.0.0.1") else None

    def seen_from(self, guest: Guest) -> str:
        if self.loopback_registry is None or guest.loopback is None:
            return self.reference
        _, colon, port = self.loopback_registry.partition(":")
        return self.reference.replace(self.loopback_registry, f"{guest.loopback}{colon}{port}", 1)


def push_busybox(directory: Path, registry: str) -> str:
    """Make an image of the machine's static busybox and push it; its reference."""
    for program, package in TOOLS.items():
        if shutil.which(program) is None:
            raise DemoError(f"{program} is missing: apt-get install {package}")
    busybox = Path(shutil.which("busybox") or "")
    root = directory / "root"
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    for applet in _output(str(busybox), "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    layout = directory / "layout"
    tagged = f"{layout}:latest"
    reference = f"{registry}/busybox:latest"
    _output("umoci", "init", "--layout", str(layout))
    _output("umoci", "new", "--image", tagged)
    # Rootless, the files of whoever runs this are root's in the image all the same.
    rootless = ["--rootless"] if os.geteuid() != 0 else []
    _output("umoci", "insert", *rootless, "--image", tagged, str(root), "/")
    _output("umoci", "config", "--image", tagged, "--config.env=PATH=/bin", "--config.cmd=/bin/sh")
    _output(
        *("skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"),
        *(f"oci:{tagged}", f"docker://{reference}"),
    )
    return reference


@contextmanager
def _booted(directory: Path, machine: str, image: _Image) -> Iterator[Guest]:
    """The image, booted for the block; its end is waited for."""
    console = directory / "console.log"
    (directory / "storage").mkdir()
    argv = [
        *(sys.executable, "-m", "initramfs.boot", f"--machine={machine}"),
        *(f"--socket={directory / 'agent.sock'}", f"--console={console}"),
        f"--storage={directory / 'storage'}",
    ]
    if image.loopback_registry is not None:
        # Both names that the registry may have inside; a machine of namespaces keeps this one's.
        _, colon, port = image.loopback_registry.partition(":")
        argv.append(f"--insecure-registry={image.loopback_registry}")
        argv.append(f"--insecure-registry={LOOPBACK_IN_VM}{colon}{port}")
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # ^C is for this program, which then ends the machine.
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            if not line.startswith("ready "):
                raise DemoError(f"the machine did not come up:\n{_tail(console)}")
            address = line.removeprefix("ready ")
            in_vm = not address.startswith("unix:")
            yield Guest(address, LOOPBACK_IN_VM if in_vm else None)
            # It was told to power off.
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise DemoError(f"the machine did not power off:\n{_tail(console)}") from None
        finally:
            process.terminate()


def _innkeep(guest: Guest, *words: str) -> int:
    """Run the command line on the terminal; its exit status."""
    argv = [sys.executable, "-m", "protocol.cli", "--connect", guest.address, *words]
    return subprocess.run(argv, check=False).returncode


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Say what begins, and afterwards how long it took."""
    print(f"\n==> {what}", flush=True)
    begun = time.monotonic()
    yield
    print(f"    {time.monotonic() - begun:.2f} s", flush=True)


def _output(*argv: str) -> str:
    completed = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if completed.returncode != 0:
        said = (completed.stderr or completed.stdout).strip()
        raise DemoError(f"{shlex.join(argv)}: {said}")
    return completed.stdout


def _tail(file: Path) -> str:
    text = file.read_text(errors="replace") if file.exists() else "(nothing on the console)"
    return "\n".join(text.splitlines()[-20:])


if __name__ == "__main__":
    sys.exit(main())
