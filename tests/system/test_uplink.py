"""A machine whose network is as its boot configuration says, and what it says where that fails."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol import decode_value, requests, responses
from protocol.client import AgentClient, open_client
from protocol.values import NetworkReport
from tests.support.crash import kill_agent
from tests.support.execution import execute, shell
from tests.support.machine import Machine, booted
from tests.support.router import Router, router
from tests.support.watch import until


@contextmanager
def linked(directory: Path, *words: str) -> Iterator[tuple[Machine, Router]]:
    """A machine that was told so, and the network that it is in."""
    with router(directory / "router", "10.9.0.1/24", "fd00:9::1/64") as there:
        options = [f"--append=innkeep.{word}" for word in words]
        with booted(directory, linked_to=there.pid, options=options) as machine:
            yield machine, there


async def report(client: AgentClient, url: str = "http://127.0.0.1:1/") -> NetworkReport:
    answer = await client.ask(requests.NetworkTest(url), responses.Ok)
    return decode_value(answer.data, NetworkReport)


async def addresses(client: AgentClient) -> Sequence[tuple[str, str]]:
    """Of eth0, each with its flags; those that the kernel makes itself left out."""
    told = await shell(client, "ip address show eth0")
    return re.findall(r"inet6? (\S+) (?:brd \S+ )?scope global (.*)", told)


async def test_both_families_are_set_up_and_stay_over_the_agents_death(tmp_path: Path) -> None:
    words = (
        "ip=10.9.0.2/24,fd00:9::2/64",
        "gateway=10.9.0.1,fd00:9::1",
        "dns=10.9.0.53,fd00:9::53",
        "mtu=1400",
        "mac=02:53:4d:00:00:02",
    )
    told = "eth0 has 10.9.0.2/24, fd00:9::2/64"
    with linked(tmp_path, *words) as (machine, _):

        async def is_as_told(times: int) -> None:
            # Not before it is known that nobody else has the second address.
            await until(lambda: machine.console_text().count(told) == times, machine.console, 30)
            async with open_client(machine.address) as client:
                assert (await report(client)).problems == ()
                link = await shell(client, "ip link show eth0; ip link show lo")
                assert "mtu 1400" in link
                assert "link/ether 02:53:4d:00:00:02" in link
                assert link.count("LOWER_UP") == 2
                assert sorted(await addresses(client)) == [
                    ("10.9.0.2/24", "eth0"),
                    ("fd00:9::2/64", ""),
                ]
                routes = await shell(client, "ip route; ip -6 route")
                assert routes.count("default via 10.9.0.1 dev eth0") == 1
                assert routes.count("default via fd00:9::1 dev eth0") == 1
                assert await shell(client, "cat /etc/resolv.conf") == (
                    "nameserver 10.9.0.53\nnameserver fd00:9::53\n"
                )
                await shell(client, "ping -c 1 -W 10 10.9.0.1 && ping -c 1 -W 10 fd00:9::1")

        await is_as_told(1)
        await kill_agent(machine)
        await is_as_told(2)


async def test_an_address_that_another_machine_has_is_told_and_the_others_work(
    tmp_path: Path,
) -> None:
    with linked(tmp_path, "ip=10.9.0.2/24,fd00:9::1/64") as (machine, _):
        async with open_client(machine.address) as client:
            taken = "eth0: address fd00:9::1: another machine on the link has it"
            # The IPv4 address does not wait for it.
            assert (await report(client)).dns.ok
            await shell(client, "ping -c 1 -W 10 10.9.0.1")
            await until(lambda: taken in machine.console_text(), machine.console, 30)
            assert (await report(client)).problems == (taken,)


async def test_a_gateway_need_not_be_in_a_network_of_the_vm(tmp_path: Path) -> None:
    with linked(tmp_path, "ip=10.8.0.2/32", "gateway=10.9.0.1") as (machine, there):
        there.run("ip", "route", "add", "10.8.0.2", "dev", "link0")
        async with open_client(machine.address) as client:
            assert (await report(client)).problems == ()
            await shell(client, "ping -c 1 -W 10 10.9.0.1")


@pytest.mark.parametrize("gateway", ["10.9.0.1,fd00:9::1", "10.9.0.1"])
async def test_routers_are_heard_unless_a_word_says_the_gateway(
    tmp_path: Path, gateway: str
) -> None:
    words = ("ip=10.9.0.2/24,fd00:9::2/64", f"gateway={gateway}")
    with linked(tmp_path, *words) as (machine, there):
        await until(lambda: "eth0 has" in machine.console_text(), machine.console, 30)
        log = tmp_path / "router" / "server.log"
        log.touch()
        with there.dhcp_server("--enable-ra", "--dhcp-range=fd00:9::,ra-only"):
            await until(lambda: "RTR-ADVERT" in log.read_text(), log, 30)
        # It says so before it has sent it, and has sent it before it ends.
        async with open_client(machine.address) as client:
            # What comes behind it: so it has been heard, or not.
            await shell(client, "ping -c 1 -W 10 fd00:9::1")
            routes = await shell(client, "ip -6 route")
        defaults = re.findall("default via (\\S{4})", routes)
        assert defaults == (["fd00"] if "fd00" in gateway else ["fe80"])


async def test_a_network_that_cannot_be_is_told_and_the_rest_works(tmp_path: Path) -> None:
    words = ("ip=10.9.0.2/24", "gateway=fd00:9::1")
    with linked(tmp_path, *words) as (machine, _):
        async with open_client(machine.address) as client:
            (problem,) = (await report(client)).problems
            assert "innkeep.ip, innkeep.gateway: the gateway fd00:9::1 has no address" in problem
            pong = await client.ask(requests.Ping(), responses.Pong)
            assert pong.config_errors == (problem,)
            assert (await execute(client, "true")).exit_code == 0
            refused = await client.ask(requests.Pull(image="10.9.0.1:1/none"), responses.Error)
            assert problem in refused.message


async def test_a_vm_without_an_interface_is_told_so(tmp_path: Path) -> None:
    options = ["--append=innkeep.ip=dhcp"]
    with booted(tmp_path, in_own_network=True, options=options) as machine:
        async with open_client(machine.address) as client:
            assert (await report(client)).problems == ("the VM has no network interface",)
        lines = [json.loads(line) for line in machine.console_text().splitlines() if '"ts"' in line]
        assert [line["msg"] for line in lines if line["level"] == "error"] == [
            "network: the VM has no network interface"
        ]
