"""A VM on QEMU's user network, whose DHCP server gives it its address."""

from pathlib import Path

import pytest

from protocol import decode_value, requests, responses
from protocol.client import AgentClient, open_client
from protocol.values import NetworkReport
from tests.support.crash import kill_by
from tests.support.execution import pull, shell
from tests.support.http_server import http_server
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine, booted
from tests.support.mirrors import mirrored
from tests.support.watch import until

pytestmark = pytest.mark.timeout(180)

# Emulated, on a machine that has other things to do as well, an agent takes its time to start.
PATIENCE_S = 120
ADDRESS_6 = "fec0::15/64"


async def reported(client: AgentClient, url: str) -> NetworkReport:
    answer = await client.ask(requests.NetworkTest(url), responses.Ok)
    return decode_value(answer.data, NetworkReport)


async def is_on_the_network(machine: Machine, address: str) -> None:
    """IPv4 by DHCP, and IPv6 as configured and as the router's advertisements have it."""
    async with open_client(machine.address) as client:
        with http_server() as port:
            report = await reported(client, f"http://{LOOPBACK_IN_VM}:{port}/200")
            assert (report.ok, report.problems) == (True, ()), report
        addresses = await shell(client, "ip address show eth0")
        assert addresses.count("inet 10.0.2.15/24") == addresses.count("inet ") == 1
        assert await shell(client, "cat /etc/resolv.conf") == "nameserver 10.0.2.3\n"
        assert (await shell(client, "ip route")).count("default via 10.0.2.2 dev eth0") == 1
        assert address in addresses
        await shell(client, "ping -c 1 -W 30 fec0::2")


async def test_addresses_of_both_families_stay_over_the_agents_death_and_so_does_the_lease(
    vm_registry: str, images: Images, tmp_path: Path
) -> None:
    # In the place of the fixed address that boot.py gives otherwise.
    words = (f"ip=dhcp,{ADDRESS_6}", "gateway=", "dns=")
    options = [f"--append=innkeep.{word}" for word in words]
    mirrored(tmp_path / "hosts", vm_registry)
    options.append(f"--hosts-dir={tmp_path / 'hosts'}")
    settled = f"eth0 has {ADDRESS_6}"
    with booted(tmp_path, kind="auto", in_memory=True, options=options) as machine:
        await until(lambda: settled in machine.console_text(), machine.console, PATIENCE_S)
        await is_on_the_network(machine, ADDRESS_6)
        async with open_client(machine.address) as client:
            pid = await shell(client, "pidof udhcpc")
            reference = images.busybox.reference_from(LOOPBACK_IN_VM)
            await pull(client, reference.replace(vm_registry, "mirrored.invalid"))
            await kill_by(client)
        await until(lambda: machine.console_text().count(settled) == 2, machine.console, PATIENCE_S)
        await is_on_the_network(machine, ADDRESS_6)
        async with open_client(machine.address) as client:
            assert await shell(client, "pidof udhcpc") == pid
