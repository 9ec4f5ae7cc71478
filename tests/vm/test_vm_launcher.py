"""The image's tree as the guest of the smolvm launcher: another kernel's root, a share or a disk,
configured by the environment alone."""

import shutil
import time
from pathlib import Path

import pytest
import trio

from protocol import decode_value, requests, responses
from protocol.client import AgentClient, open_client
from protocol.values import Mount, NetworkReport
from tests.support import trees
from tests.support.commands import run as run_program
from tests.support.execution import pull, run, shell
from tests.support.host_ports import HostPorts
from tests.support.http_server import http_server
from tests.support.images import Images
from tests.support.launcher import TREE, launched
from tests.support.machine import LOOPBACK_IN_VM
from tests.support.name_server import filtered, name_server
from tests.support.qemu import Qemu
from tests.vm.conftest import empty_disk

pytestmark = pytest.mark.timeout(300)

HOUR_S = 3600


async def storage_is_ready(client: AgentClient) -> None:
    status = await client.request(requests.StorageStatus())
    assert isinstance(status, responses.Ok)
    assert isinstance(status.data, dict)
    assert status.data["ready"] is True
    assert "root_error" not in status.data


async def is_on_the_network(client: AgentClient) -> None:
    with http_server() as port:
        url = f"http://{LOOPBACK_IN_VM}:{port}/200"
        answer = await client.ask(requests.NetworkTest(url), responses.Ok)
    report = decode_value(answer.data, NetworkReport)
    assert (report.ok, report.problems) == (True, ()), report
    interface = await shell(client, "ip address show eth0")
    for part in ("ether 02:53:4d:00:00:02", "inet 10.0.2.15/24", "inet6 fec0::15/64"):
        assert part in interface
    routes = await shell(client, "ip route; ip -6 route")
    for gateway in ("10.0.2.2", "fec0::2"):
        assert f"default via {gateway} dev eth0" in routes
    assert await shell(client, "cat /etc/resolv.conf") == "nameserver 10.0.2.3\n"


async def end(client: AgentClient) -> None:
    assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})


async def test_a_share_is_the_root_and_disks_have_places(
    vm_registry: str, images: Images, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(TREE, tree, symlinks=True)
    disks = []
    for name in ("storage", "root", "other"):
        (tmp_path / name).mkdir()
        disks.append(empty_disk(tmp_path / name, mib=64))
    other = disks[2].read_bytes()
    for tag in ("data", "work"):
        (tmp_path / tag).mkdir()
        (tmp_path / tag / "name").write_text(f"{tag}\n")
    with launched(
        tmp_path / "vm",
        env={
            "SMOLVM_MACHINE_NAME": "inn",
            "SMOLVM_READY_MARKER": "ready",
            "SMOLVM_MOUNT_COUNT": "2",
            "SMOLVM_MOUNT_0": "data:/srv/data:ro",
            "SMOLVM_MOUNT_1": "work:/workspace:rw",
            "SMOLVM_NETWORK_BACKEND": "virtio-net",
            "SMOLVM_NETWORK_GUEST_IP": "10.0.2.15",
            "SMOLVM_NETWORK_PREFIX_LEN": "24",
            "SMOLVM_NETWORK_GATEWAY": "10.0.2.2",
            "SMOLVM_NETWORK_DNS": "10.0.2.3",
            "SMOLVM_NETWORK_GUEST_MAC": "02:53:4D:00:00:02",
            "SMOLVM_NETWORK_GUEST_IP6": "fec0::15",
            "SMOLVM_NETWORK_PREFIX_LEN6": "64",
            "SMOLVM_NETWORK_GATEWAY6": "fec0::2",
            # What the tests need beside, and no launcher says.
            "INNKEEP_INSECURE_REGISTRY": vm_registry,
        },
        disks=disks,
        shares={tag: tmp_path / tag for tag in ("data", "work")},
        root_share=tree,
    ) as machine:
        async with open_client(machine.address) as client:
            await storage_is_ready(client)
            mounts = await shell(client, "cut -d' ' -f1-3 /proc/self/mounts")
            assert "/dev/vda /storage ext4\n" in mounts
            assert "/dev/vdb /mnt/root ext4\n" in mounts
            assert "tree /oldroot virtiofs\n" in mounts
            assert "root / overlay\n" in mounts
            assert "vdc" not in mounts
            assert await shell(client, "cat /proc/sys/kernel/hostname") == "inn\n"
            await is_on_the_network(client)
            await shell(client, "echo kept >/etc/note; rm /etc/nsswitch.conf")
            script = "cat /srv/data/name; echo >/srv/data/no 2>/dev/null || cat /workspace/name"
            assert await shell(client, script) == "data\nwork\n"
            await shell(client, "echo written >/workspace/file")
            image = images.busybox.reference_from(LOOPBACK_IN_VM)
            await pull(client, image)
            cat = ("cat", "/srv/data/name", "/workspace/name")
            assert (await run(client, image, *cat)).stdout == b"data\nwork\n"
            instead = Mount("work", "/srv/data", read_only=True)
            done = await run(client, image, *cat, mounts=(instead,))
            assert done.stdout == b"work\nwork\n"
            assert int((tree / "ready").read_text()) > 0
            await end(client)
        assert await trio.to_thread.run_sync(machine.wait) == 0
    assert (tmp_path / "work/file").read_text() == "written\n"
    # The launcher's tree is other machines', too.
    assert (tree / "etc/hostname").read_text() == "innkeep\n"
    assert (tree / "etc/nsswitch.conf").exists()
    assert not (tree / "etc/note").exists()
    for disk in disks[:2]:
        assert b": clean" in run_program("e2fsck", "-n", disk)
    note = "cat /innkeep-root/upper/etc/note"
    assert run_program("debugfs", "-R", note, disks[1]) == b"kept\n"
    assert disks[2].read_bytes() == other


async def test_a_disk_is_the_root_and_is_left_in_good_order(tmp_path: Path) -> None:
    layers = tmp_path / "layers"
    (layers / "base").mkdir(parents=True)
    trees.busybox(layers / "base")
    (layers / "numbered.tar").write_bytes(trees.archive(trees.numbered(7)))
    (layers / "layer-order").write_text("numbered\nbase\n")
    root = tmp_path / "root.img"
    with root.open("wb") as file:
        file.truncate(256 << 20)
    run_program("mke2fs", "-q", "-t", "ext4", "-d", TREE, root)
    storage = empty_disk(tmp_path, mib=64)
    # An hour ahead of what its RTC would say, had anybody set that.
    host_time_s = time.time() + HOUR_S
    with launched(
        tmp_path / "vm",
        env={
            "SMOLVM_SSH_AGENT": "1",
            "SMOLVM_DNS_FILTER": "1",
            "SMOLVM_HOST_TIME_NS": str(int(host_time_s * 1e9)),
            "SMOLVM_PACKED_LAYERS": "layers:/packed_layers",
        },
        disks=[storage],
        shares={"layers": layers},
        root_disk=root,
        program="/sbin/init",
        hardware=Qemu(tmp_path / "hardware", "-rtc", "base=2020-01-02T03:04:05"),
    ) as machine:
        async with open_client(machine.address) as client:
            await storage_is_ready(client)
            mounts = await shell(client, "cut -d' ' -f1-3 /proc/self/mounts")
            assert "/dev/vdb / ext4\n" in mounts
            assert "/dev/vda /storage ext4\n" in mounts
            assert "overlay" not in mounts
            done = await run(client, "what ever:::", "cat", "/layers/top", "/etc/passwd")
            assert done.stdout == b"7\n" + (layers / "base/etc/passwd").read_bytes()
            assert (await pull(client, "x"))["digest"] == "packed"
            assert "layer-order\n" in await shell(client, "ls /packed_layers")
            assert abs(int(await shell(client, "date +%s")) - time.time() - HOUR_S) < 300
            ports = HostPorts(tmp_path / "vm" / "agent.sock")
            with name_server() as server:
                async with filtered(ports, server):
                    assert "192.0.2.1" in await shell(client, "nslookup a.test || :")
            assert await shell(client, "echo kept >/etc/note; echo $SSH_AUTH_SOCK") == (
                "/tmp/ssh-agent.sock\n"
            )
            await end(client)
        assert await trio.to_thread.run_sync(machine.wait) == 0
    for disk in (root, storage):
        assert b": clean" in run_program("e2fsck", "-n", disk)
    assert run_program("debugfs", "-R", "cat /etc/note", root) == b"kept\n"
