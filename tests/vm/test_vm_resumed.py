"""A VM after a pause, and as a copy of another: clock, random numbers, mounts and network.

QEMU's emulation has no PTP clock of the hypervisor; it has the RTC, virtio-rng and VMGENID.
"""

import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import trio

from initramfs import qemu
from initramfs.architecture import ARCHITECTURES
from initramfs.machine import Kind, boot_words
from protocol import decode_value, requests, responses
from protocol.client import AgentClient
from protocol.values import Resumption
from tests.support.execution import shell
from tests.support.machine import PROJECT, Machine
from tests.support.qemu import monitor
from tests.support.watch import until

pytestmark = pytest.mark.timeout(300)

SECOND = 10**9
HOUR_S = 3600
PAUSE_S = 5
NOTICED = "the clock was set: clock stepped by 0.000 s"


async def resumed(client: AgentClient, request: requests.Resumed) -> Resumption:
    answer = await client.ask(request, responses.Ok)
    return decode_value(answer.data, Resumption)


async def clocks_s(client: AgentClient) -> tuple[float, float]:
    """The VM's time since 1970 and since its boot."""
    date, uptime = (await shell(client, "date +%s; cat /proc/uptime")).splitlines()
    return float(date), float(uptime.split()[0])


async def test_the_clock_of_a_vm_that_was_paused_is_stepped_and_its_generator_reseeded(
    vm: Machine, vm_client: AgentClient
) -> None:
    # On a busy machine an emulated clock goes wrong by minutes, and the RTC does not.
    await resumed(vm_client, requests.Resumed())
    real_s, up_s = await clocks_s(vm_client)
    there = 1 + vm.console_text().count(NOTICED)
    told_ns = time.time_ns() + HOUR_S * SECOND
    try:
        done = await resumed(vm_client, requests.Resumed(time_ns=told_ns, entropy=bytes(64)))
        assert done.ok, done
        assert done.clock.source == "request"
        assert abs(done.clock.step_ns - HOUR_S * SECOND) < 60 * SECOND
        assert (done.randomness.source, done.randomness.credited_bytes) == ("request", 64)
        assert "/storage" in done.mounts.checked
        new_real_s, new_up_s = await clocks_s(vm_client)
        # What waits for a time to pass is not woken by it.
        assert HOUR_S - 60 < new_real_s - real_s - (new_up_s - up_s) < HOUR_S + 60
        # Somebody else's hand is seen, the agent's own before it was not.
        await shell(vm_client, f"date -s @{int(new_real_s) + 7}")
        await until(lambda: vm.console_text().count(NOTICED) >= there, vm.console, 60)
        assert vm.console_text().count(NOTICED) == there
    finally:
        # Without a word of the host's: the RTC is right.
        done = await resumed(vm_client, requests.Resumed())
    assert (done.clock.source, done.clock.ok) == ("rtc", True)
    assert abs(done.clock.step_ns + (HOUR_S + 7) * SECOND) < 60 * SECOND
    # QEMU was given no virtio-rng.
    assert (done.randomness.ok, done.randomness.credited_bytes) == (False, 0)
    assert abs((await clocks_s(vm_client))[0] - time.time()) < 60


# What stands for a host in a VM without vsock: a request each second.
HOST = """
import socket, time
request = b'{"method":"storage_status"}'
while True:
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect("/run/agent.sock")
        agent.sendall(len(request).to_bytes(4, "big") + request)
        assert agent.recv(4096)
    time.sleep(1)
"""


class Snapshot:
    """A VM without vsock, which vhost-device-vsock could not carry over, nor often enough over a
    pause; told by its console, and with its host inside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.memory = directory / "memory"

    @contextmanager
    def running(self, name: str, *options: str) -> Iterator[Path]:
        """QEMU for the block, with an identity of its own; the console's file."""
        hardware = qemu.Hardware(
            architecture=ARCHITECTURES["amd64"],
            kind=Kind.TCG,
            image=PROJECT / "build",
            memory_bytes=512 << 20,
            cpus=1,
            words=boot_words(
                "memory",
                listen="unix:/run/agent.sock",
                more=[
                    "innkeep.log=debug",
                    f"innkeep.workload.command=python3,-I,-S,-c,{quote(HOST, safe='')}",
                ],
            ),
        )
        argv = qemu.command_line(hardware)
        at = next(n for n, word in enumerate(argv) if word.startswith("vhost-vsock-pci"))
        del argv[at - 1 : at + 1]
        argv += ["-device", f"vmgenid,guid={uuid.uuid4()}", "-device", "virtio-rng-pci"]
        argv += ["-qmp", f"unix:{self.directory / name}.sock,server=on,wait=off", *options]
        console = self.directory / f"{name}.log"
        with (
            console.open("wb") as output,
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output) as process,
        ):
            try:
                yield console
            finally:
                process.kill()

    async def stand_still(self, name: str) -> float:
        """Pause the VM, and have it go on; how many seconds it stood."""
        async with monitor(self.directory / f"{name}.sock") as qmp:
            await qmp.ask("stop")
            begun_s = time.monotonic()
            # No less, for an RTC has whole seconds only.
            await trio.sleep(PAUSE_S)
            stood_s = time.monotonic() - begun_s
            await qmp.ask("cont")
            return stood_s

    async def save(self, name: str) -> None:
        """Write all of the VM down, which stops."""
        async with monitor(self.directory / f"{name}.sock") as qmp:
            events = [{"capability": "events", "state": True}]
            await qmp.ask("migrate-set-capabilities", capabilities=events)
            await qmp.ask("migrate", uri=f"exec:cat >{self.memory}")
            while (await qmp.receive("event", "data"))["data"].get("status") != "completed":
                pass


async def test_a_pause_is_noticed_by_the_rtc_and_a_copy_by_its_generation_id(
    tmp_path: Path,
) -> None:
    snapshot = Snapshot(tmp_path)
    news = "the VM has a new generation id"
    with snapshot.running("original") as console:
        told = console.read_text
        await until(lambda: "power buttons: 1" in told(), console, 120)
        stood_s = await snapshot.stand_still("original")
        await until(lambda: "after the pause: clock st" in told(), console, 120)
        await until(lambda: told().endswith("\n"), console, 10)
        stepped = re.search(r"after the pause: clock stepped by ([\d.]+) s by rtc", told())
        assert stepped is not None, told()
        # By a second or two more or less, and by what an emulated clock has missed beside.
        assert stood_s - 1.5 < float(stepped[1]) < stood_s + 60
        await snapshot.save("original")
        assert news not in console.read_text()
    with snapshot.running("copy", "-incoming", f"exec:cat {snapshot.memory}") as console:
        await until(lambda: f"{news}: " in console.read_text(), console, 120)
        await until(lambda: console.read_text().endswith("\n"), console, 10)
        said = re.search(rf"{news}: (.*)\"", console.read_text())
    assert said is not None
    # By what the copying took, and what an emulated clock is wrong by.
    well = r"clock stepped by -?[\d.]+ s by rtc, 64 bytes for the random numbers"
    assert re.fullmatch(well, said[1]), said[1]
