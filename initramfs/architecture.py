"""What differs from one processor architecture to the next."""

import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One architecture that an image can be built for, by Debian's name for it."""

    name: str
    machine: str
    """As uname(1) and QEMU call it."""
    loader: str
    """The dynamic loader, from the root of the tree; it runs the tree's programs from outside."""
    libraries: str
    """Debian's directory of shared libraries, from the root of the tree."""
    serial: str
    """The console's serial line."""


ARCHITECTURES = {
    "amd64": Architecture(
        name="amd64",
        machine="x86_64",
        loader="usr/lib64/ld-linux-x86-64.so.2",
        libraries="usr/lib/x86_64-linux-gnu",
        serial="ttyS0",
    ),
}


def machine_architecture() -> str:
    """Debian's name for this machine's architecture, or uname's where we know none."""
    machine = platform.machine()
    names = {known.machine: known.name for known in ARCHITECTURES.values()}
    return names.get(machine, machine)
