"""What only a real kernel and a real vsock show: the image in a VM, over the wire."""

import time

import pytest
import trio

from protocol import encode, encode_frame, requests, responses
from protocol.client import AgentClient, open_client
from tests.support.crash import kill_by, successor
from tests.support.execution import execute, lifeline, pull, run, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine
from tests.support.wire import open_wire

# Under emulation a boot takes seconds, and so does a container.
pytestmark = pytest.mark.timeout(180)


async def test_a_ping_is_answered(vm_client: AgentClient) -> None:
    answer = await vm_client.request(requests.Ping())
    assert isinstance(answer, responses.Pong)
    assert answer.version == 1


async def test_the_empty_disk_was_formatted_and_is_the_storage(vm_client: AgentClient) -> None:
    answer = await vm_client.request(requests.StorageStatus())
    assert isinstance(answer, responses.Ok)
    assert isinstance(answer.data, dict)
    assert answer.data["ready"] is True
    assert 900 << 20 < answer.data["total_bytes"] < 1024 << 20
    mounted = await shell(vm_client, "grep ' /storage ' /proc/mounts")
    assert mounted.split()[:3] == ["/dev/vda", "/storage", "ext4"]


async def test_its_clock_is_one_whose_rate_was_not_measured_on_a_busy_machine(
    vm_client: AgentClient,
) -> None:
    """Else a limit of 60 s may be over in 12."""
    path = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert (await shell(vm_client, f"cat {path}")).strip() in ("acpi_pm", "kvm-clock")


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("busybox", b"hello from busybox\n"),
        ("whiteouts", b"-early\nfour\nthree\n"),
        ("zstd", b"Linux\n"),
        ("sparse_gnu", b"8388608 /many\n"),
        ("sixty_layers", b"59\n"),
    ],
)
async def test_an_image_is_pulled_from_the_machines_registry_and_run(
    vm_client: AgentClient, images: Images, name: str, output: bytes
) -> None:
    reference = getattr(images, name).reference_from(LOOPBACK_IN_VM)
    await pull(vm_client, reference)
    done = await run(vm_client, reference)
    assert (done.exit_code, done.stdout, done.stderr) == (0, output, b"")


async def test_layers_are_mounted_without_loop_devices(
    vm_client: AgentClient, images: Images
) -> None:
    await pull(vm_client, images.busybox.reference_from(LOOPBACK_IN_VM))
    assert "erofs" in await shell(vm_client, "grep /storage/layers/ /proc/mounts")
    assert await shell(vm_client, "grep -l storage /sys/block/loop*/loop/backing_file || :") == ""


async def test_controllers_are_there_for_the_commands_cgroups(vm_client: AgentClient) -> None:
    controllers = await shell(vm_client, "cat /sys/fs/cgroup/cgroup.subtree_control")
    assert {"cpu", "memory", "pids"} <= set(controllers.split())


async def test_an_answer_of_many_megabytes_arrives_whole(vm_client: AgentClient) -> None:
    """One send of more than 32 KiB would break the stream of vhost-device-vsock."""
    done = await execute(vm_client, "sh", "-c", "yes 0123456789 | head -c 8000000")
    assert done.stdout == (b"0123456789\n" * 800_000)[:8_000_000]
    assert isinstance(await vm_client.request(requests.Ping()), responses.Pong)


async def test_a_request_of_many_megabytes_arrives_whole(vm: Machine) -> None:
    async with open_wire(vm.address) as wire:
        answer = await wire.ask("ping", padding="x" * (8 << 20))
        assert answer["status"] == "pong"


async def test_many_connections_come_and_go(vm: Machine) -> None:
    for _ in range(100):
        async with open_client(vm.address) as client:
            assert isinstance(await client.request(requests.Ping()), responses.Pong)


async def test_a_hang_up_kills_what_the_connection_ran(vm: Machine) -> None:
    async with lifeline(vm.address) as line:
        async with open_client(vm.address) as client:
            script = line.script("(setsid sleep 1000 &); sleep 1000")
            await client.send(requests.VmExec(command=("sh", "-c", script)))
            await line.started()
        with trio.fail_after(10):
            await line.ended()


async def test_a_hang_up_is_noticed_behind_frames_that_nobody_read_yet(vm: Machine) -> None:
    async with lifeline(vm.address) as line:
        async with open_client(vm.address) as client:
            command = ("sh", "-c", line.script("sleep 1000"))
            await client.send(requests.VmExec(command=command))
            await line.started()
            for _ in range(100):
                await client.send(requests.Query(image="x" * 1000))
        with trio.fail_after(10):
            await line.ended()


async def test_half_a_close_is_a_hang_up_on_vsock(vm: Machine) -> None:
    async with lifeline(vm.address) as line, open_wire(vm.address) as wire:
        script = line.script("sleep 1000")
        await wire.send({"method": "vm_exec", "command": ["sh", "-c", script]})
        await line.started()
        await wire.stream.send_eof()
        with trio.fail_after(10):
            await line.ended()


async def test_only_named_peers_are_served_on_vsock(vm: Machine, vm_client: AgentClient) -> None:
    """From inside the VM, through the loopback: CID 1, which only this boot's agent serves."""
    ping = encode_frame(encode(requests.Ping())).hex()
    ask = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_VSOCK)\n"
        "s.connect((1, int(sys.argv[1])))\n"
        "try:\n"
        f"    s.sendall(bytes.fromhex({ping!r}))\n"
        "    print(s.recv(100))\n"
        "except ConnectionError:\n"
        "    print(b'')\n"
    )
    served = await execute(vm_client, "python3", "-I", "-S", "-c", ask, "6000")
    assert b"pong" in served.stdout, (served.stdout, served.stderr)
    # A second agent of the same image, which was told of no peers.
    agent = (
        "/usr/bin/python3 -I -S /usr/lib/innkeep/run_agent.py --listen vsock:7000 "
        "--storage /tmp/second/storage --run-dir /tmp/second/run 2>/tmp/second/log"
    )
    look = (
        "exec 3</tmp/second/log; grep -q 'serving on' <&3; "
        'python3 -I -S -c "$1" 7000; '
        "grep -o -m 1 'refused a connection from CID 1' <&3"
    )
    async with open_client(vm.address) as other:
        await shell(vm_client, "mkdir -p /tmp/second/storage; mkfifo /tmp/second/log")
        await other.send(requests.VmExec(command=("sh", "-c", agent)))
        refused = await execute(vm_client, "sh", "-c", look, "sh", ask)
    assert refused.stdout == b"b''\nrefused a connection from CID 1\n", refused


async def test_an_agent_that_is_killed_is_back_within_3_s_with_its_images(
    vm: Machine, images: Images
) -> None:
    image = images.busybox.reference_from(LOOPBACK_IN_VM)
    serving = successor(vm)
    async with open_client(vm.address) as client:
        info = await pull(client, image)
        begun = time.monotonic()
        await kill_by(client)
    await serving()
    async with open_client(vm.address) as client:
        assert isinstance(await client.request(requests.Ping()), responses.Pong)
        assert time.monotonic() - begun < 3
        assert await client.request(requests.Query(image=image)) == responses.Ok(info)
        assert (await run(client, image)).stdout == b"hello from busybox\n"
