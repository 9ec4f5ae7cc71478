"""The workload protocol over vsock, with tokens from wherever a VM may have its own."""

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from protocol import Port
from protocol.client import (
    AuthenticationFailed,
    ConnectionFailed,
    WorkloadClient,
    open_client,
    open_workload_client,
)
from tests.support.commands import run
from tests.support.crash import kill_by
from tests.support.execution import shell
from tests.support.machine import Machine, booted
from tests.support.token_image import image_with_token
from tests.support.workload import LINE_BYTES, TOKEN, Counted, Peer, counting, open_log, open_peer

pytestmark = pytest.mark.timeout(240)

FW_CFG = "/sys/firmware/qemu_fw_cfg/by_name/opt/innkeep/token/raw"
OTHER_TOKEN = "f" * 32
# Emulated, the command is the slow one.
LINES = (512 << 10) // LINE_BYTES
MEMORY_BOMB = "kept = []\nwhile True: kept.append(b'x' * (1 << 20))"


@pytest.fixture(scope="module")
def workload_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A VM with `TOKEN` in its initramfs, and another in fw_cfg, whose workload waits for TERM."""
    directory = tmp_path_factory.mktemp("vm")
    (directory / "token").write_text(OTHER_TOKEN)
    command = (
        "sh,-c,trap%20'echo%20ended;exit%207'%20TERM;echo%20begun;while%20:;do%20sleep%200.1;done"
    )
    with booted(
        directory,
        kind="auto",
        in_memory=True,
        options=[
            f"--image={image_with_token(directory, TOKEN)}",
            f"--token-file={directory / 'token'}",
            f"--append=innkeep.workload.command={command}",
        ],
    ) as machine:
        yield machine


@asynccontextmanager
async def back(address: str) -> AsyncIterator[WorkloadClient]:
    """A control connection to the next agent, as soon as that serves."""
    async with AsyncExitStack() as stack:
        while True:
            # Nothing tells of it from outside; hosts try again, too.
            with suppress(ConnectionFailed):
                client = open_workload_client(address, OTHER_TOKEN)
                connection = await stack.enter_async_context(client)
                break
            await trio.sleep(0.1)
        yield connection


async def test_commands_run_over_vsock_and_lose_nothing_to_a_reader_that_keeps_up(
    workload_vm: Machine,
) -> None:
    async with open_peer(workload_vm.address) as peer:
        for number in range(1, 21):
            await peer.shell(number, f"echo {number}; exit {number}")
        for number in range(1, 21):
            told = await peer.over(number)
            assert (told.stdout, told.exit) == (b"%d\n" % number, (number, "exited"))
        await peer.shell(21, "stty size", tty=True)
        assert (await peer.over(21)).stdout == b"24 80\r\n"
        await peer.exec(22, "sleep", "1000")
        await peer.signal(22, signal.SIGINT)
        assert (await peer.over(22)).exit == (130, "signaled: SIGINT")


async def test_every_byte_arrives_over_vsock_or_is_told_as_truncated(workload_vm: Machine) -> None:
    async with open_peer(workload_vm.address) as peer:
        await peer.exec(1, *counting(LINES))
        counted = Counted()
        while peer.told(1).exit is None:
            message = await peer.receive()
            data = getattr(message, "data", None)
            if data is not None:
                counted.feed(data, truncated=message.truncated)  # type: ignore[union-attr]
        assert peer.told(1).exit == (0, "exited")
        assert counted.offset == LINES * LINE_BYTES


async def test_a_command_that_the_kernel_kills_for_memory_is_oom(workload_vm: Machine) -> None:
    async with open_peer(workload_vm.address) as peer:
        await peer.exec(1, "python3", "-I", "-S", "-c", MEMORY_BOMB)
        # Emulated, a gigabyte takes its time.
        await peer.until(lambda: peer.told(1).is_over, within_s=120)
        assert peer.told(1).exit == (137, "oom")


async def test_a_hang_up_kills_execs_over_vsock(workload_vm: Machine) -> None:
    async with open_client(workload_vm.address) as client, open_peer(workload_vm.address) as peer:
        await shell(client, "mkfifo /tmp/life")
        await peer.shell(1, "exec 9>/tmp/life; echo on; sleep 1000")
        async with trio.open_nursery() as nursery:
            # Ends with the last who holds it.
            nursery.start_soon(shell, client, "cat /tmp/life")
            await peer.output(1, b"on")
            await peer.client.aclose()


async def test_the_boots_workload_and_its_log_survive_the_agent_and_the_token_is_read_again(
    workload_vm: Machine,
) -> None:
    address = workload_vm.address
    async with open_log(address) as log:
        await log.output(0, b"begun\n")
    with pytest.raises(AuthenticationFailed):
        async with open_workload_client(address, OTHER_TOKEN):
            pass
    async with open_client(address) as client:
        assert TOKEN not in await shell(client, "cat /proc/cmdline; dmesg")
        assert await shell(client, f"cat {FW_CFG}") == OTHER_TOKEN
        assert await shell(client, "stat -c %a /etc/innkeep/token") == "600\n"
        await shell(client, "umount /etc/innkeep/token && rm /etc/innkeep/token")
    async with open_client(address) as client:
        await kill_by(client)
    # With the first token gone, the next agent has the other.
    async with (
        back(address) as first,
        open_workload_client(address, OTHER_TOKEN, Port.WORKLOAD_LOGS) as reader,
    ):
        log, peer = Peer(reader), Peer(first)
        await log.output(0, b"begun\n")
        assert log.told(0).stdout == b"begun\n"
        await peer.ready()
        await peer.signal(0, signal.SIGTERM)
        await peer.until(lambda: peer.told(0).exit == (7, "exited"))
        await log.output(0, b"ended\n")
        assert log.told(0).stdout == b"begun\nended\n"
    console = workload_vm.console_text()
    assert TOKEN not in console
    assert OTHER_TOKEN not in console


@pytest.mark.parametrize("place", ["a disk of its own", "the storage disk"])
async def test_a_disk_that_the_boot_names_has_the_token(tmp_path: Path, place: str) -> None:
    (tmp_path / "files").mkdir()
    for directory in (tmp_path, tmp_path / "files"):
        (directory / "token").write_text(f"{TOKEN}\n")
    storage = tmp_path / "storage.img"
    # A disk has whole sectors, and no end where the token's is.
    for file, size in ((tmp_path / "token", 1 << 20), (storage, 64 << 20)):
        with file.open("ab") as disk:
            disk.truncate(size)
    run("mkfs.ext4", "-q", "-d", tmp_path / "files", storage)
    options, device = [f"--disk={tmp_path / 'token'}"], "/dev/vdb"
    if place == "the storage disk":
        options, device = [], "/storage/token"
    options += [f"--append=innkeep.workload.token_file={device}"]
    with booted(tmp_path, kind="auto", storage=storage, options=options) as vm:
        async with open_peer(vm.address) as peer, open_client(vm.address) as client:
            await peer.exec(1, "true")
            assert (await peer.over(1)).exit == (0, "exited")
            assert TOKEN in await shell(client, f"head -c 64 {device}")
            assert TOKEN not in await shell(client, "cat /proc/cmdline; dmesg")
        with pytest.raises(AuthenticationFailed):
            async with open_workload_client(vm.address, OTHER_TOKEN):
                pass
        assert TOKEN not in vm.console_text()
