"""The disk that keeps the changes to a VM's root: what is on it, over boots and their ends."""

import os
import signal
from pathlib import Path

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.commands import run as run_program
from tests.support.execution import execute, shell
from tests.support.machine import Machine, booted
from tests.support.process_tree import arguments, descendants
from tests.vm.conftest import empty_disk
from tests.vm.test_vm_disks import MOUNTED, OURS, SOMEBODYS, TriedDisk, tried

pytestmark = pytest.mark.timeout(300)

KEPT = f"{MOUNTED}/innkeep-root"
# As init does it, on a small tree.
OVERLAY = (
    "mkdir -p /tmp/root; mount -t overlay -o "
    f"lowerdir=/etc,upperdir={KEPT}/upper,workdir={KEPT}/work,redirect_dir=off,index=off,"
    "metacopy=off root /tmp/root"
)


async def opened(disk: TriedDisk, device: str | None = None) -> str:
    """Let init's program open the disk; what it says is wrong, or nothing."""
    program = "/usr/lib/innkeep/open_root_disk.py"
    python = ("/usr/bin/python3", "-I", "-S", program, device or disk.device, MOUNTED)
    await disk.shell("mkdir -p $mounted")
    done = await execute(disk.client, *python)
    assert (done.exit_code == 0) == (done.stdout == b""), done
    return done.stdout.decode().strip()


async def test_an_empty_disk_gets_its_directories(vm_client: AgentClient) -> None:
    async with tried(vm_client) as disk:
        assert await opened(disk) == ""
        assert await disk.shell(f"ls {KEPT}") == "upper\nwork\n"


async def test_somebodys_ext4_keeps_all_of_it_and_gets_only_a_directory_more(
    vm_client: AgentClient,
) -> None:
    async with tried(vm_client, made=SOMEBODYS) as disk:
        await disk.shell(
            "mkdir -p $mounted; mount $device $mounted; mkdir $mounted/upper $mounted/root;"
            "echo kept >$mounted/upper/etc"
        )
        await disk.unmount()
        assert await opened(disk) == ""
        assert await disk.shell("cat $mounted/upper/etc; ls $mounted") == (
            "kept\ninnkeep-root\nlost+found\nroot\nupper\n"
        )


async def test_what_one_boot_was_told_is_not_there_in_the_next(vm_client: AgentClient) -> None:
    """Nor is what hides it; links lead nowhere."""
    async with tried(vm_client) as disk:
        assert await opened(disk) == ""
        await disk.shell(
            f"cd {KEPT}/upper; mkdir -p etc/innkeep; echo secret >etc/innkeep/token;"
            "echo name >etc/hostname; mknod etc/resolv.conf c 0 0; echo kept >etc/hosts"
        )
        await disk.unmount()
        assert await opened(disk) == ""
        assert await disk.shell(f"cd {KEPT}/upper; find etc -type f -o -type c") == "etc/hosts\n"
        await disk.shell(
            f"cd {KEPT}/upper; rm -r etc; mkdir /tmp/elsewhere; echo kept >/tmp/elsewhere/hostname;"
            "ln -s /tmp/elsewhere etc"
        )
        await disk.unmount()
        assert await opened(disk) == ""
        assert await disk.shell("cat /tmp/elsewhere/hostname; rm -r /tmp/elsewhere") == "kept\n"


async def test_a_full_disk_opens_and_has_room_again_when_something_is_removed(
    vm_client: AgentClient,
) -> None:
    async with tried(vm_client, made=OURS) as disk:
        assert await opened(disk) == ""
        await disk.shell(f"cat /dev/zero >{KEPT}/upper/all 2>/dev/null || :; sync -f {KEPT}")
        size = await disk.shell(f"stat -c %s {KEPT}/upper/all")
        await disk.unmount()
        assert await opened(disk) == ""
        assert await disk.shell(f"stat -c %s {KEPT}/upper/all") == size
        try:
            await disk.shell(f"{OVERLAY}; rm /tmp/root/all; echo room >/tmp/root/hosts")
        finally:
            await disk.shell("umount /tmp/root")


async def test_a_full_disk_of_somebody_else_is_left_as_it_is(vm_client: AgentClient) -> None:
    async with tried(vm_client, mib=8, made=f"{SOMEBODYS} -N 32") as disk:
        # To the last inode: for a small directory there might be room.
        await disk.shell(
            "mkdir -p $mounted; mount $device $mounted; cat /dev/zero >$mounted/all 2>/dev/null"
            " || :; n=0; while touch $mounted/$n 2>/dev/null; do n=$((n + 1)); done;"
            "sync -f $mounted; umount $mounted"
        )
        listed = f"mount -o ro $device {MOUNTED}; ls -lR $mounted; cd $mounted; sha256sum all"
        before = await disk.shell(listed)
        await disk.unmount()
        said = await opened(disk)
        assert said.startswith(f"keep the root's changes on {disk.device}: No space left"), said
        assert await disk.shell(listed) == before


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        pytest.param(f"{OURS}; truncate -s 16M $file", "", "was cut off", id="truncated"),
        pytest.param(
            "printf 'LUKS\\272\\276\\000\\001' | dd of=$file conv=notrunc 2>/dev/null",
            "",
            "it holds crypto_LUKS",
            id="LUKS",
        ),
        pytest.param(
            "head -c 2097152 /dev/urandom | dd of=$file conv=notrunc 2>/dev/null",
            "",
            "it holds data of no known file system",
            id="random",
        ),
        pytest.param(OURS, "-r", "the disk is read-only", id="read-only"),
    ],
)
async def test_any_other_disk_is_named_and_left_as_it_is(
    vm_client: AgentClient, made: str, options: str, says: str
) -> None:
    async with tried(vm_client, made=made, options=options) as disk:
        before = await disk.digest()
        said = await opened(disk)
        assert disk.device in said
        assert says in said
        assert await disk.digest() == before
        assert await disk.shell("grep $mounted /proc/mounts || :") == ""


async def test_a_disk_that_is_missing_is_named(vm_client: AgentClient) -> None:
    async with tried(vm_client) as disk:
        said = await opened(disk, "/dev/vdz")
        assert said == "probe /dev/vdz: No such file or directory: /dev/vdz"


CHANGES = """
set -e
echo kept >/etc/note
mkdir -p /opt/tree/inner
echo deep >/opt/tree/inner/file
rm /etc/nsswitch.conf
chmod 700 /usr/bin/tar
cp -a /etc/ssl /etc/ssl.mine
rm -r /etc/ssl
"""
LOOK = """
cat /etc/note /opt/tree/inner/file
ls /etc/nsswitch.conf /etc/ssl 2>/dev/null || echo gone
stat -c %a /usr/bin/tar
ls /etc/ssl.mine
cat /etc/hostname /proc/sys/kernel/hostname
ls /etc/innkeep 2>/dev/null || echo no token
"""
SEEN = "kept\ndeep\ngone\n700\ncerts\n{name}\n{name}\n"


async def test_changes_to_the_root_survive_a_power_cut_and_a_shutdown(tmp_path: Path) -> None:
    disk = tmp_path / "root.img"
    with booted(
        tmp_path / "first",
        kind="auto",
        in_memory=True,
        options=[f"--root-disk={disk}", '--append=innkeep.hostname="first"'],
    ) as machine:
        async with open_client(machine.address) as client:
            await shell(client, CHANGES)
            assert await shell(client, LOOK) == SEEN.format(name="first") + "no token\n"
            # As by a boot that had one.
            await shell(client, "mkdir /etc/innkeep; echo secret >/etc/innkeep/token; sync")
        os.kill(qemu_of(machine), signal.SIGKILL)
    with booted(
        tmp_path / "second", kind="auto", in_memory=True, options=[f"--root-disk={disk}"]
    ) as machine:
        async with open_client(machine.address) as client:
            assert "was not unmounted in good order" in machine.console_text()
            assert await shell(client, LOOK) == SEEN.format(name="innkeep")
            # Somebody whom a shutdown does not end, and whose file keeps the disk writable.
            await shell(
                client,
                "mkdir /sys/fs/cgroup/survivor; exec 9>/etc/open; echo written >&9;"
                "sleep 1000 </dev/null >/dev/null 2>&1 &"
                "echo $! >/sys/fs/cgroup/survivor/cgroup.procs",
            )
            assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})
        assert await trio.to_thread.run_sync(machine.wait) == 0
        assert "make the root read-only" in machine.console_text()
    assert b": clean" in run_program("e2fsck", "-n", disk)
    run_program("e2fsck", "-fn", disk)
    assert run_program("debugfs", "-R", "cat /innkeep-root/upper/etc/open", disk) == b"written\n"


async def test_a_vm_whose_root_disk_is_somebody_elses_boots_and_says_so(tmp_path: Path) -> None:
    disk = empty_disk(tmp_path, mib=16)
    content = b"LUKS\xba\xbe\x00\x01" + b"somebody's data" * 1000
    disk.write_bytes(content + bytes((16 << 20) - len(content)))
    with booted(
        tmp_path / "vm", kind="auto", in_memory=True, options=[f"--root-disk={disk}"]
    ) as machine:
        async with open_client(machine.address) as client:
            answer = await client.request(requests.StorageStatus())
            assert isinstance(answer, responses.Ok)
            assert isinstance(answer.data, dict)
            assert answer.data["ready"] is True
            assert answer.data["root_error"].startswith("mount /dev/vda: it holds crypto_LUKS")
            assert await shell(client, "echo here >/etc/here; cat /etc/here") == "here\n"
            assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})
        assert await trio.to_thread.run_sync(machine.wait) == 0
    assert disk.read_bytes() == content + bytes((16 << 20) - len(content))


def qemu_of(machine: Machine) -> int:
    (qemu,) = (
        pid
        for pid in descendants(machine.pid)
        if any(b"qemu-system-" in word for word in arguments(pid)[:1])
    )
    return qemu
