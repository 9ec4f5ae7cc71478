"""A microVM as QEMU's command line, and its disk."""

import os
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from initramfs.architecture import Architecture
from initramfs.errors import BootError
from initramfs.machine import Kind

DEFAULT_DISK_SIZE = 10 << 30

# What saves time at boot and costs a user nothing.
_QUICK = (
    "quiet",
    # A machine that panicked is at its end: QEMU leaves with -no-reboot.
    "panic=-1",
    "cryptomgr.notests",
    "8250.nr_uarts=1",
    "i8042.noaux",
    "random.trust_cpu=on",
)
# What more than that is good enough for a machine that is emulated, and so for tests only: without
# these it boots in twice the time.
_EMULATED = (
    "mitigations=off",
    "init_on_alloc=0",
    "nokaslr",
    "no5lvl",
    "tsc=reliable",
    # How fast the TSC is, a kernel finds out at boot, from a few microseconds of its own: on a busy
    # host it may be wrong by several times, and all time limits with it. This one has a known rate.
    "clocksource=acpi_pm",
    "audit=0",
    "apparmor=0",
    "rcupdate.rcu_expedited=1",
    "no_timer_check",
)


@frozen
class Share:
    """A virtiofs share; `socket` is the descriptor of a connection to the virtiofsd that has it."""

    tag: str
    socket: int


@frozen(kw_only=True)
class Hardware:
    """A machine to be made.

    `disk` and `root_disk` are raw disk images or None, and in the guest /dev/vda, and /dev/vdb or
    the first where there is no other; `vsock_socket` is the descriptor of a connection to
    vhost-device-vsock, or None where the kernel's own vhost-vsock is used, with `cid`.
    """

    architecture: Architecture
    kind: Kind
    image: Path
    memory_bytes: int
    cpus: int
    words: Sequence[str]
    disk: Path | None = None
    root_disk: Path | None = None
    cid: int = 3
    vsock_socket: int | None = None
    shares: Sequence[Share] = ()
    disks: Sequence[Path] = ()
    """More raw images, which the machine only reads."""
    initramfs: Path | None = None
    """In the place of the image's own."""
    token_file: Path | None = None
    """With the token of the workload's ports; the guest reads it from fw_cfg."""


def command_line(hardware: Hardware) -> list[str]:
    """QEMU's arguments, the first being its name."""
    memory_mib = hardware.memory_bytes >> 20
    kvm = hardware.kind is Kind.KVM
    # vhost-device-vsock and virtiofsd read and write the machine's memory themselves.
    shared = hardware.vsock_socket is not None or bool(hardware.shares)
    machine = "q35" if kvm else "q35,hpet=off"
    argv = [
        f"qemu-system-{hardware.architecture.machine}",
        *("-machine", f"{machine},memory-backend=memory" if shared else machine),
        # Emulated on several threads, a kernel that patches its code now and then runs into its own
        # breakpoint (Oops: int3); on one it never does, and boots in three quarters of the time.
        *("-accel", "kvm" if kvm else "tcg,thread=single"),
        # A kernel that may copies by `rep movsb`, which is emulated byte by byte: reading a file
        # takes nine times as long, and sending on vsock twice.
        *("-cpu", "host" if kvm else "max"),
        *("-smp", str(hardware.cpus)),
        *("-m", f"{memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-serial", "stdio"),
        *("-kernel", str(hardware.image / "vmlinux")),
        *("-initrd", str(hardware.initramfs or hardware.image / "initramfs.cpio")),
        *("-append", " ".join(kernel_words(hardware))),
        *("-netdev", "user,id=net"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
    ]
    if shared:
        memory = f"memory-backend-memfd,id=memory,size={memory_mib}M,share=on"
        argv += ["-object", memory]
    if hardware.vsock_socket is not None:
        argv += ["-chardev", f"socket,id=vsock,fd={hardware.vsock_socket}"]
        argv += ["-device", "vhost-user-vsock-pci,chardev=vsock"]
    else:
        argv += ["-device", f"vhost-vsock-pci,guest-cid={hardware.cid}"]
    for name, disk in (("storage", hardware.disk), ("root", hardware.root_disk)):
        if disk is not None:
            drive = f"if=none,id={name},format=raw,discard=unmap,file={_value(str(disk))}"
            argv += ["-drive", drive, "-device", f"virtio-blk-pci,drive={name}"]
    for number, path in enumerate(hardware.disks):
        drive = f"if=none,id=disk{number},format=raw,readonly=on,file={_value(str(path))}"
        argv += ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{number}"]
    if hardware.token_file is not None:
        argv += ["-fw_cfg", f"name=opt/innkeep/token,file={_value(str(hardware.token_file))}"]
    for number, share in enumerate(hardware.shares):
        argv += ["-chardev", f"socket,id=share{number},fd={share.socket}"]
        argv += ["-device", f"vhost-user-fs-pci,chardev=share{number},tag={_value(share.tag)}"]
    return argv


def _value(text: str) -> str:
    """The value of an option's property: a comma in it is written twice."""
    return text.replace(",", ",,")


def kernel_words(hardware: Hardware) -> list[str]:
    """The kernel's command line."""
    console = f"console={hardware.architecture.serial}"
    emulated = _EMULATED if hardware.kind is Kind.TCG else ()
    return [console, *_QUICK, *emulated, *hardware.words]


def make_disk(path: Path, size_bytes: int = DEFAULT_DISK_SIZE) -> None:
    """Make the disk, where there is none yet; it takes up only what is written to it."""
    try:
        with path.open("xb") as file:
            os.truncate(file.fileno(), size_bytes)
    except FileExistsError:
        pass
    except OSError as error:
        raise BootError(f"cannot make the disk {path}: {error.strerror}") from error
