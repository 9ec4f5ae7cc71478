"""What a VM tells of itself, on a kernel that has controllers, pressure and disks of its own."""

import json

import pytest

from protocol import decode_value, requests, responses
from protocol.client import AgentClient
from protocol.machine import Diagnosis, VmStats
from tests.support.execution import execute, lifeline, pull, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, PROJECT, Machine
from tests.support.watch import until

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
LIMIT_MIB = 24
# Limits its own cgroup, and eats until a child of it is killed.
EATER = (
    "own=/sys/fs/cgroup$(sed s/0::// /proc/self/cgroup); "
    f"echo {LIMIT_MIB}M >$own/memory.max; tail /dev/zero; echo eaten >$1; sleep 1000; :"
)


async def stats(client: AgentClient) -> VmStats:
    answer = await client.ask(requests.VmStats(), responses.Ok)
    return decode_value(answer.data, VmStats)


async def diagnosis(client: AgentClient) -> Diagnosis:
    answer = await client.ask(requests.Diagnose(), responses.Ok)
    return decode_value(answer.data, Diagnosis)


async def test_a_command_that_ate_its_memory_shows_in_all_counts(vm_client: AgentClient) -> None:
    before, diagnosed = await stats(vm_client), await diagnosis(vm_client)
    fifo = (await shell(vm_client, "mktemp -u")).strip()
    await shell(vm_client, f"mkfifo {fifo}")
    done = await execute(vm_client, "sh", "-c", EATER, "sh", fifo, background=True)
    pid = int(done.stdout)
    assert await shell(vm_client, f"cat {fifo}; rm {fifo}") == "eaten\n"
    after = await stats(vm_client)
    (command,) = (each for each in after.commands if each.pid == pid)
    assert command.program == "sh"
    assert command.oom_kills == 1
    assert command.memory_limit_bytes == LIMIT_MIB * MIB
    assert command.memory_peak_bytes is not None
    assert LIMIT_MIB * MIB * 0.5 < command.memory_peak_bytes <= LIMIT_MIB * MIB
    assert command.memory_bytes is not None
    assert 0 < command.memory_bytes < command.memory_peak_bytes
    assert command.pids == 2
    assert (before.oom_kills, after.oom_kills) != (None, None)
    assert after.oom_kills == (before.oom_kills or 0) + 1
    assert before.workloads is not None
    assert after.workloads is not None
    assert after.workloads.oom_kills == (before.workloads.oom_kills or 0) + 1
    told = await diagnosis(vm_client)
    assert told.oom_kills == (diagnosed.oom_kills or 0) + 1
    assert told.cgroups is not None
    assert told.cgroups.workloads_memory_events is not None
    assert told.cgroups.workloads_memory_events.oom_kill >= 1
    await shell(vm_client, f"kill -9 {pid}")


async def test_what_a_container_writes_and_sends_is_counted(
    vm: Machine, vm_client: AgentClient, images: Images
) -> None:
    image = images.busybox.reference_from(LOOPBACK_IN_VM)
    await pull(vm_client, image)
    before = await stats(vm_client)
    async with lifeline(vm.address, "/storage/workspace", "/workspace") as line:
        write = "dd if=/dev/zero of=/workspace/written bs=1M count=8 conv=fsync"
        request = requests.Run(
            image=image,
            command=("sh", "-c", f"{write}; {line.script('sleep 1000; :')}"),
            persistent_overlay_id="stats",
            detached=True,
        )
        answer = await vm_client.ask(request, responses.Completed)
        await line.started()
        after = await stats(vm_client)
        (container,) = (each for each in after.containers if each.id == answer.stdout.decode())
        await shell(vm_client, f"rm /workspace/written; kill -9 {container.pid}")
        await line.ended()
    assert (container.overlay, container.program) == ("stats", "sh")
    assert container.written_bytes is not None
    assert 8 * MIB <= container.written_bytes <= after.io.written_bytes
    assert container.pids == 2
    assert container.pids_limit is not None
    assert container.oom_kills == 0
    assert container.memory_peak_bytes is not None
    assert container.memory_peak_bytes >= (container.memory_bytes or 0) > 0
    assert after.io.written_bytes - before.io.written_bytes >= 8 * MIB
    # The pull came through it.
    assert {each.name: each.received_bytes > 0 for each in after.network}["eth0"]
    assert after.missing == ()


async def test_pressure_is_told_and_grows_with_work(vm_client: AgentClient) -> None:
    def waited_us(told: VmStats) -> int:
        assert told.pressure is not None
        assert told.pressure.cpu.some is not None
        assert None not in (told.pressure.memory.full, told.pressure.io.full)
        return told.pressure.cpu.some.total_us

    before = waited_us(await stats(vm_client))
    # Two at a time on each processor, so that one has to wait.
    count = 2 * (await stats(vm_client)).cpu.count
    busy = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
    await shell(vm_client, f"for _ in $(seq {count}); do ({busy}) & done; wait")
    assert waited_us(await stats(vm_client)) > before


async def test_a_diagnosis_of_a_vm_has_no_part_missing(vm: Machine, vm_client: AgentClient) -> None:
    await until(lambda: '"ready ' in vm.console_text(), vm.console, 60)
    told = await diagnosis(vm_client)
    assert told.missing == ()
    assert told.versions is not None
    manifest = json.loads((PROJECT / "build/manifest.json").read_text())
    assert told.versions.image == manifest["key"]
    assert told.versions.kernel.startswith("6.12.")
    assert {each.name for each in told.boot.steps} == {
        *("agent", "config", "listening", "serving", "services", "storage", "network", "doorbell")
    }
    assert (told.storage.ready, told.storage.device) == (True, "/dev/vda")
    assert told.disks is not None
    (disk,) = (each for each in told.disks if each.name == "vda")
    assert (disk.size_bytes, disk.read_only) == (1024 * MIB, False)
    assert told.mounts is not None
    assert ("/storage", "/dev/vda", "ext4") in {
        (each.path, each.source, each.kind) for each in told.mounts.points
    }
    assert told.network.interfaces is not None
    (interface,) = (each for each in told.network.interfaces if each.name == "eth0")
    assert (interface.up, interface.carrier) == (True, True)
    assert "10.0.2.15/24" in interface.addresses
    assert told.network.routes is not None
    assert ("0.0.0.0/0", "10.0.2.2") in {
        (each.destination, each.gateway) for each in told.network.routes
    }
    assert told.network.resolv_conf == "nameserver 10.0.2.3\n"
    assert told.cgroups is not None
    assert {"cpu", "io", "memory", "pids"} <= set(told.cgroups.controllers)
    assert told.agent is not None
    assert told.agent.oom_score_adj == -1000
