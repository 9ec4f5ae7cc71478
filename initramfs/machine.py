"""What kind of machine the image is started in, and what it is told."""

import os
import platform
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

from attrs import frozen

from initramfs.errors import BootError


class Kind(StrEnum):
    """How the image runs: in a VM with or without hardware's help, or without a VM."""

    KVM = "kvm"
    TCG = "tcg"
    NAMESPACES = "namespaces"


@frozen
class Host:
    """What of this machine decides which kinds can work on it."""

    virtualises: bool
    """The processor has svm or vmx (any arm64 may), without which KVM opens but does not work."""
    kvm_opens: bool
    vhost_vsock_opens: bool

    @classmethod
    def inspect(cls) -> "Host":
        """This machine, as it is now."""
        flags = set(re.findall(r"\b(svm|vmx)\b", Path("/proc/cpuinfo").read_text()))
        return cls(
            virtualises=bool(flags) or platform.machine() == "aarch64",
            kvm_opens=_opens("/dev/kvm"),
            vhost_vsock_opens=_opens("/dev/vhost-vsock"),
        )


@frozen
class Choice:
    """What to start. `host_vsock`: the host reaches the VM by AF_VSOCK, else by a unix socket."""

    kind: Kind
    host_vsock: bool = False
    notice: str | None = None
    """A line for the person who left the choice to us."""


def choose(wanted: str, host: Host) -> Choice:
    """The kind for `auto`, `kvm`, `tcg` or `namespaces`.

    Raises:
        BootError: KVM is asked for and cannot work here.
    """
    obstacle = None
    if not host.virtualises:
        obstacle = "the processor shows neither svm nor vmx"
    elif not host.kvm_opens:
        obstacle = "/dev/kvm cannot be opened"
    if wanted == Kind.NAMESPACES:
        return Choice(Kind.NAMESPACES)
    vsock = host.vhost_vsock_opens
    if wanted == Kind.TCG:
        return Choice(Kind.TCG, host_vsock=vsock)
    if obstacle is None:
        return Choice(Kind.KVM, host_vsock=vsock)
    if wanted == Kind.KVM:
        raise BootError(f"no KVM: {obstacle}")
    notice = f"no KVM ({obstacle}): the machine is emulated, and slow"
    return Choice(Kind.TCG, host_vsock=vsock, notice=notice)


@frozen
class Network:
    """A VM's one network interface, as QEMU's user network has it."""

    address: str = "10.0.2.15/24"
    gateway: str = "10.0.2.2"
    """Also the machine's own loopback, as the VM sees it."""
    nameserver: str = "10.0.2.3"

    def words(self) -> list[str]:
        """The boot configuration that makes the agent set it up."""
        return [
            f"innkeep.ip={self.address}",
            f"innkeep.gateway={self.gateway}",
            f"innkeep.dns={self.nameserver}",
        ]


def boot_words(
    storage: str,
    *,
    root: str | None = None,
    listen: str | None = None,
    network: Network | None = None,
    insecure_registries: Iterable[str] = (),
    more: Sequence[str] = (),
) -> list[str]:
    """The boot configuration for init and the agent; `storage` is a device, `dir` or `memory`,
    `root` the device that keeps the root's changes."""
    words = [f"innkeep.storage={storage}"]
    if root is not None:
        words.append(f"innkeep.root={root}")
    if listen is not None:
        words.append(f"innkeep.listen={listen}")
    if registries := ",".join(insecure_registries):
        words.append(f"innkeep.insecure_registry={registries}")
    return [*words, *(network.words() if network else []), *more]


def parse_size(text: str) -> int:
    """Bytes for a number with K, M, G or T behind it, as QEMU writes sizes; M where none is.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"([1-9][0-9]*)([KMGT]?)", text)
    if match is None:
        raise ValueError(f"{text!r} is no size, expected one like 512M or 2G")
    number, unit = match.groups()
    return int(number) << {"K": 10, "M": 20, "G": 30, "T": 40, "": 20}[unit]


def _opens(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
