"""Files in a VM: large ones, quotas, and a disk that loses its power."""

import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import execute, refusal, shell
from tests.support.files import begin, read, send, sha256, upload, write
from tests.support.machine import PROJECT, Machine, booted
from tests.support.rounds import rounds
from tests.vm.conftest import empty_disk

pytestmark = pytest.mark.timeout(rounds(quick=300, soak=3_600))

MIB = 1024 * 1024
QUOTED = "/mnt/quoted"
OWNER = 1000
MOST_KIB = 1024

# Q_SETQUOTA of quotactl(2), for a user, with QIF_BLIMITS of its struct if_dqblk.
SET_QUOTA = """
import ctypes, os, struct, sys
limits = struct.pack("8QI4x", int(sys.argv[3]), 0, 0, 0, 0, 0, 0, 0, 1)
libc = ctypes.CDLL(None, use_errno=True)
if libc.quotactl(0x800008 << 8, sys.argv[1].encode(), int(sys.argv[2]), limits):
    sys.exit(os.strerror(ctypes.get_errno()))
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A VM with room for the largest file."""
    directory = tmp_path_factory.mktemp("files")
    with booted(directory, kind="auto", storage=empty_disk(directory, mib=6 * 1024)) as guest:
        yield guest


@pytest.fixture
async def client(machine: Machine) -> AsyncIterator[AgentClient]:
    async with open_client(machine.address) as connection:
        yield connection


async def agents_memory_bytes(client: AgentClient) -> int:
    pid = int((await shell(client, "head -n 1 /sys/fs/cgroup/agent/cgroup.procs")).strip())
    status = await read(client, f"/proc/{pid}/status")
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith(b"VmRSS"))
    return int(kib) * 1024


async def test_a_large_file_goes_in_and_out_with_equal_digests_and_little_memory(
    machine: Machine, client: AgentClient
) -> None:
    path = "/workspace/large"
    count = rounds(quick=64, soak=4096)
    chunks = random.Random(1)
    await upload(client, path, bytes(8 * MIB))
    assert len(await read(client, path)) == 8 * MIB
    before = await agents_memory_bytes(client)
    await begin(client, path, count * MIB, digest=True)
    for number in range(count):
        told = await send(client, chunks.randbytes(MIB), done=number == count - 1)
    assert isinstance(told, dict)
    async with open_client(machine.address) as other:
        assert await agents_memory_bytes(other) - before < 8 * MIB
    again = random.Random(1)
    async with client.stream(requests.FileRead(path, digest=True)) as answers:
        async for answer in answers:
            assert isinstance(answer, responses.DataChunk)
            assert answer.done or answer.data == again.randbytes(MIB)
    assert (answer.sha256, answer.size) == (told["sha256"], told["size"])
    assert answer.size == count * MIB
    assert await agents_memory_bytes(client) - before < 8 * MIB
    assert await client.request(requests.FileRemove(path)) == responses.Ok()


@pytest.mark.parametrize("state", ["full", "read-only"])
async def test_the_vms_own_files_are_written_whatever_its_storage_takes(
    client: AgentClient, state: str
) -> None:
    # A link to a path of that length needs a block of its own: a full disk has none.
    directory = f"/root/{'long' * 20}"
    path, data = f"{directory}/file", bytes(range(256)) * 100
    await write(client, path, b"old")
    if state == "full":
        # To the last block: in what is left at the end of the first file there may be room.
        fill = "cat /dev/zero >/storage/filling{0} 2>/dev/null; sync -f /storage;"
        free = "fallocate -l $(($(stat -f -c %a*%S /storage)-(4<<20))) /storage/filling;"
        await shell(client, f"{free} {fill.format(1)} {fill.format(2)}")
    else:
        await shell(client, "mount -o remount,ro /storage")
    try:
        error = await refusal(client, requests.FileWrite("/workspace/file", data))
        assert error.code == "FILE_IO_FAILED"
        assert ("No space left" if state == "full" else "Read-only file system") in error.message
        await write(client, path, data)
        assert await read(client, path) == data
        resumed = {"resume": True, "sha256": sha256(data[::-1])}
        await begin(client, path, len(data), **resumed)
        await send(client, data[::-1][:1000])
        assert await client.request(requests.Ping()) is not None
        assert await begin(client, path, len(data), **resumed) == {"offset": 1000}
        await send(client, data[::-1][1000:], done=True)
        assert await read(client, path) == data[::-1]
        assert await shell(client, f"ls -A {directory}; ls /run/innkeep/uploads") == "file\n"
    finally:
        await shell(client, "mount -o remount,rw /storage; rm -f /storage/filling*")


async def test_a_host_that_hangs_up_in_the_middle_of_a_file_leaves_nothing_open(
    machine: Machine, client: AgentClient
) -> None:
    path = "/tmp/half-read"
    await shell(client, f"head -c {32 * MIB} /dev/zero >{path}")
    pid = int((await shell(client, "head -n 1 /sys/fs/cgroup/agent/cgroup.procs")).strip())
    async with open_client(machine.address) as cut, cut.stream(requests.FileRead(path)) as answers:
        assert isinstance(await anext(answers), responses.DataChunk)
    while path in await shell(client, f"ls -l /proc/{pid}/fd"):
        # Each answer is a turn of the agent's, and there is no other news of its end.
        pass
    assert len(await read(client, path)) == 32 * MIB
    await shell(client, f"rm {path}")


@pytest.fixture
async def quoted(client: AgentClient, tmp_path: Path) -> AsyncIterator[str]:
    """An ext4 of the VM where one user may have a MiB."""
    version = (await shell(client, "uname -r")).strip()
    for name in ("quota_tree", "quota_v2"):
        await write(client, f"/tmp/{name}.ko", kernel_module(version, name, tmp_path))
        await shell(client, f"busybox insmod /tmp/{name}.ko; rm /tmp/{name}.ko")
    steps = (
        "truncate -s 64M /storage/quoted",
        "/usr/sbin/mke2fs -q -F -O quota /storage/quoted",
        f"mkdir {QUOTED}",
        f"mount -o loop,usrquota /storage/quoted {QUOTED}",
    )
    await shell(client, " && ".join(steps))
    device = (await shell(client, f"grep {QUOTED} /proc/mounts")).split()[0]
    words = ("python3", "-c", SET_QUOTA, device, str(OWNER), str(MOST_KIB))
    done = await execute(client, *words)
    assert done.exit_code == 0, done.stderr
    yield QUOTED
    await shell(client, f"umount {QUOTED} && rmdir {QUOTED} && rm /storage/quoted")


def kernel_module(version: str, name: str, directory: Path) -> bytes:
    """A module of the VM's kernel that is not in the image."""
    (package,) = (PROJECT / "build/cache/debs").glob(f"linux-image-{version}_*.deb")
    unpacked = directory / "kernel"
    if not unpacked.exists():
        subprocess.run(["dpkg", "-x", package, unpacked], check=True)
    (module,) = unpacked.glob(f"usr/lib/modules/*/kernel/fs/quota/{name}.ko.xz")
    return subprocess.run(["xz", "-dc", module], check=True, capture_output=True).stdout


async def test_a_quota_of_the_owner_ends_an_upload_and_leaves_the_target_untouched(
    client: AgentClient, quoted: str
) -> None:
    path = f"{quoted}/file"
    await write(client, path, b"old", uid=OWNER)
    data = random.randbytes(2 * MIB)
    for _ in range(2):
        error = await refusal(client, requests.FileWrite(path, data, uid=OWNER))
        assert error.code == "FILE_IO_FAILED"
        assert error.message == f"write {path}: Disk quota exceeded"
    await begin(client, path, 3 * MIB, uid=OWNER)
    answers = [
        await client.request(requests.FileWriteChunk(data[:MIB], done=number == 2))
        for number in range(3)
    ]
    refused = next(answer for answer in answers if isinstance(answer, responses.Error))
    assert refused.message == f"write {path}: Disk quota exceeded"
    assert await read(client, path) == b"old"
    assert (await shell(client, f"ls -A {quoted}")).split() == ["file", "lost+found"]
    # Others have room, and so has this one up to its quota.
    await write(client, f"{quoted}/another", data)
    await write(client, path, data[: 512 * 1024], uid=OWNER)


async def test_a_quota_holds_through_an_overlay_too(client: AgentClient, quoted: str) -> None:
    options = "lowerdir=lower,upperdir=upper,workdir=work"
    steps = "mkdir lower upper work merged && mount -t overlay"
    await shell(client, f"cd {quoted} && {steps} -o {options} overlay merged")
    try:
        path = f"{quoted}/merged/file"
        await write(client, path, b"old", uid=OWNER)
        data = random.randbytes(2 * MIB)
        error = await refusal(client, requests.FileWrite(path, data, uid=OWNER))
        assert error.message == f"write {path}: Disk quota exceeded"
        assert await read(client, path) == b"old"
        await write(client, path, data[: 512 * 1024], uid=OWNER)
    finally:
        await shell(client, f"umount {quoted}/merged")


async def test_what_was_answered_is_on_the_disk_when_the_power_goes(tmp_path: Path) -> None:
    disk = empty_disk(tmp_path)
    data = random.randbytes(3 * MIB)
    with booted(tmp_path / "first", kind="auto", storage=disk) as machine:
        async with open_client(machine.address) as client:
            await write(client, "/workspace/small", b"old")
            await write(client, "/workspace/small", b"new", mode=0o600, uid=OWNER)
            await upload(client, "/workspace/dir/large", data)
            fields = {"resume": True, "sha256": sha256(data)}
            async with open_client(machine.address) as cut:
                await begin(cut, "/workspace/cut", len(data))
                await send(cut, data[:MIB])
                await begin(client, "/workspace/resumed", len(data), **fields)
                await send(client, data[:MIB])
                # The power goes: QEMU is killed as it is.
                await client.send(requests.VmExec(("sh", "-c", "echo b >/proc/sysrq-trigger")))
                machine.wait()
    with booted(tmp_path / "second", kind="auto", storage=disk) as machine:
        async with open_client(machine.address) as client:
            assert await read(client, "/workspace/small") == b"new"
            assert await shell(client, "stat -c %a:%u /workspace/small") == f"600:{OWNER}\n"
            assert await read(client, "/workspace/dir/large") == data
            left = (await shell(client, "ls -A /workspace")).split()
            assert [name for name in left if not name.startswith(".innkeep-resume-")] == [
                "dir",
                "small",
            ]
            told = await begin(client, "/workspace/resumed", len(data), **fields)
            assert isinstance(told, dict)
            offset = told["offset"]
            await send(client, data[offset:], done=True)
            assert await read(client, "/workspace/resumed") == data
