"""What boot.py decides, and the exact command lines that follow.

KVM and vhost-vsock need hardware that builders' machines lack, so what is not run there is held to
the letter here.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from initramfs import qemu
from initramfs.architecture import ARCHITECTURES
from initramfs.errors import BootError
from initramfs.machine import Choice, Host, Kind, Network, boot_words, choose, parse_size
from initramfs.virtiofs import virtiofsd

ABLE = Host(virtualises=True, kvm_opens=True, vhost_vsock_opens=True)
PLAIN = Host(virtualises=False, kvm_opens=True, vhost_vsock_opens=False)
QUICK = "quiet panic=-1 cryptomgr.notests 8250.nr_uarts=1 i8042.noaux random.trust_cpu=on"


def hardware(kind: Kind, **more: object) -> qemu.Hardware:
    settings: dict[str, object] = {
        "architecture": ARCHITECTURES["amd64"],
        "kind": kind,
        "image": Path("/image"),
        "memory_bytes": 1 << 30,
        "cpus": 2,
        "words": boot_words("/dev/vda", network=Network(), insecure_registries=["10.0.2.2:5000"]),
        **more,
    }
    return qemu.Hardware(**settings)  # type: ignore[arg-type]  # one place makes them all


class TestTheChoice:
    def test_kvm_is_taken_where_processor_and_device_allow_it(self) -> None:
        assert choose("auto", ABLE) == Choice(Kind.KVM, host_vsock=True)

    def test_a_kvm_device_on_a_processor_without_the_flag_is_not_trusted(self) -> None:
        choice = choose("auto", PLAIN)
        assert choice.kind is Kind.TCG
        assert choice.notice is not None
        assert "neither svm nor vmx" in choice.notice

    def test_without_the_device_the_machine_is_emulated_and_it_is_said(self) -> None:
        host = Host(virtualises=True, kvm_opens=False, vhost_vsock_opens=False)
        choice = choose("auto", host)
        assert choice.kind is Kind.TCG
        assert choice.notice is not None
        assert "/dev/kvm cannot be opened" in choice.notice

    def test_kvm_that_was_asked_for_and_cannot_work_is_refused(self) -> None:
        with pytest.raises(BootError, match="no KVM: the processor shows neither svm nor vmx"):
            choose("kvm", PLAIN)

    def test_the_daemon_is_needed_only_without_the_kernels_vsock(self) -> None:
        assert not choose("tcg", PLAIN).host_vsock
        assert choose("tcg", ABLE).host_vsock
        assert not choose("kvm", Host(True, True, vhost_vsock_opens=False)).host_vsock

    def test_namespaces_ask_nothing_of_the_processor(self) -> None:
        assert choose("namespaces", PLAIN) == Choice(Kind.NAMESPACES)


class TestTheCommandLine:
    def test_of_kvm_with_the_kernels_vsock(self) -> None:
        words = (
            f"console=ttyS0 {QUICK} innkeep.storage=/dev/vda "
            "innkeep.insecure_registry=10.0.2.2:5000 innkeep.ip=10.0.2.15/24 "
            "innkeep.gateway=10.0.2.2 innkeep.dns=10.0.2.3"
        )
        assert qemu.command_line(hardware(Kind.KVM, cid=42, disk=Path("/a,b.img"))) == [
            "qemu-system-x86_64",
            *("-machine", "q35"),
            *("-accel", "kvm"),
            *("-cpu", "host"),
            *("-smp", "2"),
            *("-m", "1024M"),
            *("-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none"),
            *("-serial", "stdio"),
            *("-kernel", "/image/vmlinux"),
            *("-initrd", "/image/initramfs.cpio"),
            *("-append", words),
            *("-netdev", "user,id=net"),
            *("-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "vhost-vsock-pci,guest-cid=42"),
            *("-drive", "if=none,id=storage,format=raw,discard=unmap,file=/a,,b.img"),
            *("-device", "virtio-blk-pci,drive=storage"),
        ]

    def test_of_kvm_with_the_daemons_vsock_shares_the_machines_memory(self) -> None:
        line = qemu.command_line(hardware(Kind.KVM, vsock_socket=7))
        assert line[line.index("-machine") + 1] == "q35,memory-backend=memory"
        assert "memory-backend-memfd,id=memory,size=1024M,share=on" in line
        assert "socket,id=vsock,fd=7" in line
        assert "vhost-user-vsock-pci,chardev=vsock" in line
        assert not any("guest-cid" in word for word in line)

    def test_of_more_disks_has_them_behind_the_storage_to_be_read_only(self) -> None:
        disks = [Path("/b,c"), Path("/d")]
        line = qemu.command_line(hardware(Kind.KVM, cid=42, disk=Path("/a"), disks=disks))
        assert line[-8:] == [
            *("-drive", "if=none,id=disk0,format=raw,readonly=on,file=/b,,c"),
            *("-device", "virtio-blk-pci,drive=disk0"),
            *("-drive", "if=none,id=disk1,format=raw,readonly=on,file=/d"),
            *("-device", "virtio-blk-pci,drive=disk1"),
        ]

    def test_of_shares_has_a_device_for_each_and_the_machines_memory_shared(self) -> None:
        shares = [qemu.Share("code", 8), qemu.Share("a,b", 9)]
        line = qemu.command_line(hardware(Kind.KVM, cid=42, shares=shares))
        assert line[line.index("-machine") + 1] == "q35,memory-backend=memory"
        assert "memory-backend-memfd,id=memory,size=1024M,share=on" in line
        assert "vhost-vsock-pci,guest-cid=42" in line
        assert line[-8:] == [
            *("-chardev", "socket,id=share0,fd=8"),
            *("-device", "vhost-user-fs-pci,chardev=share0,tag=code"),
            *("-chardev", "socket,id=share1,fd=9"),
            *("-device", "vhost-user-fs-pci,chardev=share1,tag=a,,b"),
        ]

    def test_users_of_kvm_keep_what_the_emulated_kernel_goes_without(self) -> None:
        for word in ("mitigations=off", "nokaslr", "apparmor=0", "clocksource=acpi_pm"):
            assert word not in qemu.kernel_words(hardware(Kind.KVM))
            assert word in qemu.kernel_words(hardware(Kind.TCG))


class TestVirtiofsd:
    def test_debians_package_is_taken_before_the_one_that_came_with_qemu(
        self, tmp_path: Path
    ) -> None:
        for name in ("usr/libexec/virtiofsd", "usr/lib/qemu/virtiofsd"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()
        assert virtiofsd(Path("/a,b"), 7, tmp_path) == [
            f"{tmp_path}/usr/libexec/virtiofsd",
            "--shared-dir=/a,b",
            "--fd=7",
            "--log-level=error",
        ]

    def test_qemus_own_takes_a_directory_with_a_comma_too(self, tmp_path: Path) -> None:
        program = tmp_path / "usr/lib/qemu/virtiofsd"
        program.parent.mkdir(parents=True)
        program.touch()
        options = r"source=/a\,b\\c,log_level=err"
        assert virtiofsd(Path(r"/a,b\c"), 7, tmp_path) == [
            *(str(program), "-f", "-o", options, "--fd=7")
        ]

    def test_without_one_the_package_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BootError, match="virtiofsd is missing: install the package virtiofsd"):
            virtiofsd(Path("/shared"), 7, tmp_path)


class TestDisks:
    def test_one_that_is_missing_is_made_sparse(self, tmp_path: Path) -> None:
        disk = tmp_path / "storage.img"
        qemu.make_disk(disk)
        assert disk.stat().st_size == qemu.DEFAULT_DISK_SIZE
        assert disk.stat().st_blocks == 0

    def test_one_that_is_there_keeps_what_it_holds(self, tmp_path: Path) -> None:
        disk = tmp_path / "storage.img"
        disk.write_bytes(b"data")
        qemu.make_disk(disk)
        assert disk.read_bytes() == b"data"

    def test_one_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BootError, match=f"cannot make the disk {tmp_path}/none/disk"):
            qemu.make_disk(tmp_path / "none" / "disk")


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512 << 20), ("512M", 512 << 20), ("2G", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes_are_read_as_qemu_writes_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "1GB", "many"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--machine=xen"], "invalid choice: 'xen'"),
        (["--memory=lots"], "'lots' is no size, expected one like 512M or 2G"),
        (["--hosts-dir=/nowhere"], "--hosts-dir /nowhere: there is no such directory"),
        (["--machine=namespaces", "--hosts-dir=/nowhere"], "there is no such directory"),
        (["--host-dir", "/"], "unrecognized argument --host-dir (did you mean --hosts-dir?)"),
        (["--mem=1G"], "unrecognized argument --mem (did you mean --memory?)"),
        (["--append=--"], "--append: `--` says nothing alone"),
        (["--share=/srv"], "'/srv' is no TAG=DIR, with a tag of at most 36 bytes"),
        (["--share=a/b=/srv"], "'a/b=/srv' is no TAG=DIR"),
        (["--share=" + 37 * "a" + "=/srv"], "aaa=/srv' is no TAG=DIR"),
        (["--machine=namespaces", "--share=a=/"], "namespaces have no virtiofs"),
        (["--machine=namespaces", "--disk=/a"], "namespaces have no disks"),
        (["--machine=namespaces", "--image=/nowhere"], "no image in /nowhere: run `make image`"),
        (["--machine=tcg", "--image=/nowhere"], "no image in /nowhere: run `make image`"),
    ],
)
def test_a_wrong_argument_is_one_line_without_a_traceback(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "initramfs.boot", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert not re.search("Traceback", done.stderr)
