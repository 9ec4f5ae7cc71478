"""What becomes of a storage disk by what is on it: files in a VM, made disks by loop devices there.

The agent's own code brings each up, in the VM's mount namespace, as it does at boot.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest

from protocol import decode_value, requests, responses
from protocol.client import AgentClient, open_client
from protocol.machine import Diagnosis
from protocol.values import StorageStatus
from tests.support.execution import execute, refusal, shell
from tests.support.machine import booted
from tests.vm.conftest import empty_disk

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
MOUNTED = "/mnt/tried"
PROGRAM = """
import sys
sys.path.insert(0, "/usr/lib/innkeep")
from pathlib import Path
from agent.errors import AgentError
from agent.storage.disk import Disk
try:
    disk = Disk(Path(sys.argv[2]), device=sys.argv[1])
    getattr(disk, sys.argv[3])()
except AgentError as error:
    sys.exit(f"{error.code}: {error.message}")
"""

# linux/fs.h
FIFREEZE, FITHAW = "0xC0045877", "0xC0045878"
IOCTL = "import fcntl, os, sys; fcntl.ioctl(os.open(sys.argv[1], 0), int(sys.argv[2], 0))"


@attrs.frozen
class TriedDisk:
    """A file in the VM, and the device that it is there."""

    client: AgentClient
    file: str
    device: str

    async def bring_up(self) -> str:
        """Let the agent's code mount it; what it says is wrong, or nothing."""
        return await self.call("bring_up")

    async def call(self, method: str) -> str:
        python = ("/usr/bin/python3", "-I", "-S", "-c", PROGRAM)
        done = await execute(self.client, *python, self.device, MOUNTED, method)
        assert (done.exit_code == 0) == (done.stderr == b""), done
        return done.stderr.decode().strip()

    async def shell(self, script: str) -> str:
        words = {"device": self.device, "file": self.file, "mounted": MOUNTED}
        names = "; ".join(f"{name}={value}" for name, value in words.items())
        return await shell(self.client, f"set -e; {names}; {script}")

    async def digest(self) -> str:
        return await self.shell("sync; sha256sum <$file")

    async def unmount(self) -> None:
        await self.shell("umount $mounted")


@asynccontextmanager
async def tried(
    client: AgentClient, *, mib: int = 32, made: str = ":", options: str = ""
) -> AsyncIterator[TriedDisk]:
    """A disk of zeros, then of what a script has `made` of its $file; gone after the block."""
    file = "/storage/tried.img"
    script = f"set -e; file={file}; truncate -s {mib}M $file; {made}"
    await shell(client, script)
    attach = f"device=$(losetup -f); losetup {options} $device {file}; echo $device"
    device = (await shell(client, f"set -e; {attach}")).strip()
    disk = TriedDisk(client, file, device)
    try:
        yield disk
    finally:
        await disk.shell(
            '! grep -q " $mounted " /proc/mounts || umount $mounted; losetup -d $device; rm $file'
        )


OURS = "/usr/sbin/mke2fs -q -t ext4 -L innkeep $file"
SOMEBODYS = "/usr/sbin/mke2fs -q -t ext4 -L photos $file"


async def test_an_empty_disk_gets_its_file_system(vm_client: AgentClient) -> None:
    async with tried(vm_client) as disk:
        assert await disk.bring_up() == ""
        assert await disk.shell("ls $mounted") == "layers\nlost+found\noverlays\nworkspace\n"
        assert await disk.shell("/usr/sbin/blkid -p -o value -s TYPE $device") == "ext4\n"


@pytest.mark.parametrize("made", [OURS, SOMEBODYS], ids=["ours", "somebody's"])
async def test_an_ext4_keeps_its_files_whoever_made_it(vm_client: AgentClient, made: str) -> None:
    async with tried(vm_client, made=made) as disk:
        await disk.shell("mkdir -p $mounted; mount $device $mounted; echo kept >$mounted/note")
        await disk.unmount()
        assert await disk.bring_up() == ""
        assert await disk.shell("cat $mounted/note; ls $mounted") == (
            "kept\nlayers\nlost+found\nnote\noverlays\nworkspace\n"
        )


async def test_a_disk_that_grew_is_grown_into(vm_client: AgentClient) -> None:
    async with tried(vm_client, made=OURS) as disk:
        assert await disk.bring_up() == ""
        await disk.shell("echo kept >$mounted/note")
        before = int(await disk.shell("stat -f -c %b $mounted"))
        await disk.unmount()
        await disk.shell("truncate -s 128M $file; losetup -c $device")
        assert await disk.bring_up() == ""
        assert int(await disk.shell("stat -f -c %b $mounted")) > 3 * before
        assert await disk.shell("cat $mounted/note") == "kept\n"
        await disk.unmount()
        await disk.shell("e2fsck -fn $device")


async def test_a_dirty_journal_is_replayed_and_nothing_lost(vm_client: AgentClient) -> None:
    async with tried(vm_client, made=OURS) as disk:
        assert await disk.bring_up() == ""
        # What a power cut leaves: the file system as it is while it is mounted.
        await disk.shell(
            "echo kept >$mounted/note; mkdir $mounted/workspace/d; sync -f $mounted;"
            "cp $file $file.cut; umount $mounted; cat $file.cut >$file; rm $file.cut;"
            "losetup -c $device; blockdev --flushbufs $device"
        )
        assert await disk.bring_up() == ""
        assert await disk.shell("cat $mounted/note; ls -d $mounted/workspace/d") == (
            f"kept\n{MOUNTED}/workspace/d\n"
        )
        await disk.unmount()
        await disk.shell("e2fsck -fn $device")


async def test_a_full_disk_comes_up(vm_client: AgentClient) -> None:
    async with tried(vm_client, made=OURS) as disk:
        assert await disk.bring_up() == ""
        await disk.shell("cat /dev/zero >$mounted/workspace/all 2>/dev/null || :")
        size = await disk.shell("stat -c %s $mounted/workspace/all")
        await disk.unmount()
        assert await disk.bring_up() == ""
        assert await disk.shell("stat -c %s $mounted/workspace/all") == size


async def test_what_was_freed_goes_back_to_the_host(vm_client: AgentClient) -> None:
    async with tried(vm_client) as disk:
        assert await disk.bring_up() == ""
        await disk.shell("head -c 20000000 /dev/urandom >$mounted/file; sync -f $mounted")
        taken = int(await disk.shell("du -k $file | cut -f1"))
        await disk.shell("rm $mounted/file; sync -f $mounted")
        assert await disk.call("trim") == ""
        assert int(await disk.shell("du -k $file | cut -f1")) < taken - 15_000


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        pytest.param(
            f"{OURS}; truncate -s 16M $file", "", "MOUNT_FAILED: .* was cut off", id="truncated"
        ),
        pytest.param(
            "printf 'LUKS\\272\\276\\000\\001' | dd of=$file conv=notrunc 2>/dev/null",
            "",
            "FORMAT_FAILED: .* it holds crypto_LUKS",
            id="LUKS",
        ),
        pytest.param(
            "head -c 2097152 /dev/urandom | dd of=$file conv=notrunc 2>/dev/null",
            "",
            "FORMAT_FAILED: .* data of no known file system",
            id="random",
        ),
        pytest.param(OURS, "-r", "MOUNT_FAILED: .* the disk is read-only", id="read-only"),
        pytest.param(":", "-r", "MOUNT_FAILED: .* the disk is read-only", id="read-only, empty"),
        pytest.param("mkswap $file >/dev/null", "", "FORMAT_FAILED: .* swap", id="swap"),
        pytest.param(
            # Larger blocks than the kernel's pages.
            f"{OURS} -F -b 65536 2>/dev/null",
            "",
            "MOUNT_FAILED: mount .* as ext4: Invalid argument",
            id="refused by the kernel",
        ),
    ],
)
async def test_any_other_disk_is_named_and_left_as_it_is(
    vm_client: AgentClient, made: str, options: str, says: str
) -> None:
    async with tried(vm_client, made=made, options=options) as disk:
        before = await disk.digest()
        said = await disk.bring_up()
        assert disk.device in said
        assert re.match(says, said), said
        assert await disk.digest() == before


async def is_ready(client: AgentClient) -> bool:
    status = await client.ask(requests.StorageStatus(), responses.Ok)
    return decode_value(status.data, StorageStatus).ready


async def test_without_usable_storage_the_rest_of_the_agent_works(tmp_path: Path) -> None:
    disk = empty_disk(tmp_path, mib=16)
    content = b"somebody's data" * 1000
    disk.write_bytes(content + bytes(16 * MIB - len(content)))
    with booted(tmp_path, kind="auto", storage=disk) as machine:
        async with open_client(machine.address) as client:
            assert not await is_ready(client)
            assert await shell(client, "echo here") == "here\n"
            failed = await refusal(client, requests.FormatStorage())
            assert failed.code == "FORMAT_FAILED"
            assert "/dev/vda" in failed.message
            assert disk.read_bytes() == content + bytes(16 * MIB - len(content))
            # Somebody has it wiped, as the message says.
            wipe = "for at in 0 15; do dd if=/dev/zero of=/dev/vda bs=1M count=1 seek=$at; done"
            await shell(client, f"({wipe}) 2>&1")
            assert await client.request(requests.FormatStorage()) == responses.Ok()
            assert await is_ready(client)
            assert await shell(client, "ls /storage; stat -f -c %T /storage") == (
                "erofs\nlayers\nlost+found\noci\noverlays\nuploads\nworkspace\next2/ext3\n"
            )
            # Somebody who copies the disk has it hold still: it is in order, and the answer comes.
            for order in (FIFREEZE, FITHAW):
                done = await execute(client, "python3", "-I", "-S", "-c", IOCTL, "/storage", order)
                assert done.exit_code == 0, done
                assert await is_ready(client)
            # An error on the disk, after which the kernel takes no writes.
            await shell(client, "mount -o remount,errors=remount-ro /storage")
            await shell(client, "echo an error >/sys/fs/ext4/vda/trigger_fs_error")
            assert not await is_ready(client)
            answer = await client.ask(requests.Diagnose(), responses.Ok)
            told = decode_value(answer.data, Diagnosis)
            assert not told.storage.ready
            assert str(told.storage.error).startswith("it takes no writes any more: ")
            assert told.storage.total_bytes
