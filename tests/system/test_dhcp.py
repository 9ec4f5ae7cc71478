"""A machine whose address a real DHCP server gives it, and takes away again."""

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from attrs import frozen

from initramfs.local_registry import LocalRegistry
from protocol import decode_value, requests, responses
from protocol.client import AgentClient, ConnectionFailed, open_client
from protocol.values import NetworkReport
from tests.support.crash import kill_agent
from tests.support.execution import pull, run, shell
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.router import Router, router
from tests.support.watch import until

CLIENT = "cat /run/innkeep/dhcp/udhcpc.pid"
RANGE = "--dhcp-range=10.9.0.50,10.9.0.50,255.255.255.0,10m"
ELSEWHERE = "--dhcp-range=10.9.0.70,10.9.0.70,255.255.255.0,10m"
OPTIONS = (
    "--dhcp-option=option:router,10.9.0.1",
    "--dhcp-option=option:dns-server,10.9.0.53,10.9.0.54",
    "--dhcp-option=option:domain-search,one.test,two.test",
)


@frozen
class Leased:
    machine: Machine
    router: Router

    async def told(self, what: str, since: int = 0) -> None:
        """Return once the log has said so, after its first `since` characters."""
        text = self.machine.console_text
        await until(lambda: what in text()[since:], self.machine.console, 60)

    async def renewed(self, client: AgentClient, address: str) -> None:
        """Have the lease renewed, and wait until the machine goes by what comes of it."""
        # The answer waits until there is a client, and its first attempts are over.
        await problems(client)
        said = len(self.machine.console_text())
        await shell(client, f"kill -USR1 $({CLIENT})")
        await self.told(f"eth0 has {address} from DHCP server", said)

    async def released(self, client: AgentClient) -> None:
        """Have the lease given back, and wait until the machine is without it."""
        said = len(self.machine.console_text())
        await shell(client, f"kill -USR2 $({CLIENT})")
        await self.told("is over", said)


@pytest.fixture(scope="module")
def leased(
    registry: LocalRegistry, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Leased]:
    directory = tmp_path_factory.mktemp("leased")

    async def pull_image(address: str) -> None:
        async with open_client(address) as client:
            await pull(client, images.busybox.reference)

    with booted(directory, insecure_registries=[registry.address]) as machine:
        trio.run(pull_image, machine.address)
    with (
        router(directory / "router", "10.9.0.1/24") as there,
        booted(
            directory,
            linked_to=there.pid,
            options=[
                "--append=innkeep.ip=dhcp",
                "--append=innkeep.hostname=guest",
                "--append=innkeep.log=debug",
            ],
        ) as machine,
    ):
        yield Leased(machine, there)


@pytest.fixture
async def client(leased: Leased) -> AsyncIterator[AgentClient]:
    async with open_client(leased.machine.address) as connection:
        yield connection


async def problems(client: AgentClient) -> tuple[str, ...]:
    answer = await client.ask(requests.NetworkTest("http://127.0.0.1:1/"), responses.Ok)
    return decode_value(answer.data, NetworkReport).problems


async def addresses(client: AgentClient) -> list[str]:
    return re.findall(r"inet (\S+)", await shell(client, "ip -4 address show eth0"))


async def test_without_an_answer_the_vm_is_ready_all_the_same_and_a_later_one_is_taken(
    leased: Leased, client: AgentClient
) -> None:
    await leased.told('"ready ')
    silent = "eth0: no DHCP server has answered in 5 s"
    assert await problems(client) == (silent,)
    refused = await client.ask(requests.Pull(image="10.9.0.1:1/none"), responses.Error)
    assert silent in refused.message
    with leased.router.dhcp_server(RANGE, *OPTIONS):
        await leased.renewed(client, "10.9.0.50/24")
        assert await problems(client) == ()
        assert await addresses(client) == ["10.9.0.50/24"]
        assert "default via 10.9.0.1 dev eth0" in await shell(client, "ip route")
        assert await shell(client, "cat /etc/resolv.conf") == (
            "search one.test two.test\nnameserver 10.9.0.53\nnameserver 10.9.0.54\n"
        )
        assert leased.router.leases().split()[2:4] == ["10.9.0.50", "guest"]
        await shell(client, "ping -c 1 -W 10 10.9.0.1")


async def test_a_vm_that_goes_on_after_a_pause_asks_its_server_again(
    leased: Leased, client: AgentClient
) -> None:
    with leased.router.dhcp_server(RANGE, *OPTIONS):
        await leased.renewed(client, "10.9.0.50/24")
        said = len(leased.machine.console_text())
        await client.ask(requests.Resumed(), responses.Ok)
        await leased.told("eth0 has 10.9.0.50/24 from DHCP server", said)


async def test_a_lease_goes_on_over_the_agents_death_with_the_same_client(
    leased: Leased, client: AgentClient
) -> None:
    with leased.router.dhcp_server(RANGE, *OPTIONS):
        await leased.renewed(client, "10.9.0.50/24")
        pid = await shell(client, CLIENT)
        said = len(leased.machine.console_text())
        await kill_agent(leased.machine)
        await leased.told("eth0 has 10.9.0.50/24 from DHCP server 10.9.0.1", said)
        async with open_client(leased.machine.address) as anew:
            assert await problems(anew) == ()
            assert await addresses(anew) == ["10.9.0.50/24"]
            assert await shell(anew, CLIENT) == pid
            assert await shell(anew, "pidof udhcpc") == pid
            assert len((await shell(anew, "ip route")).splitlines()) == 2
            assert (await shell(anew, "ip -4 address show eth0")).count("inet") == 1


async def test_a_server_that_knows_better_moves_the_vm_and_its_containers_name_servers(
    leased: Leased, client: AgentClient, images: Images
) -> None:
    image = images.busybox.reference
    with leased.router.dhcp_server(RANGE, *OPTIONS):
        await leased.renewed(client, "10.9.0.50/24")
        for overlay, script in (("follows", "true"), ("own", "echo mine >/etc/resolv.conf")):
            more = {"persistent_overlay_id": overlay}
            assert (await run(client, image, "sh", "-c", script, **more)).exit_code == 0
    with leased.router.dhcp_server(ELSEWHERE, "--dhcp-option=option:dns-server,10.9.0.99"):
        await leased.renewed(client, "10.9.0.70/24")
        assert await problems(client) == ()
        assert await addresses(client) == ["10.9.0.70/24"]
        for overlay, text in (("follows", b"nameserver 10.9.0.99\n"), ("own", b"mine\n")):
            more = {"persistent_overlay_id": overlay}
            seen = await run(client, image, "cat", "/etc/resolv.conf", **more)
            assert seen.stdout == text


async def test_what_a_server_says_of_routes_and_mtu_is_taken_and_goes_when_it_says_so_no_more(
    leased: Leased, client: AgentClient
) -> None:
    look = "ip route | sed -n '/via/s/ dev.*//p'; ip link show eth0 | grep -o 'mtu [0-9]*'"
    more = ("option:mtu,1400", "option:classless-static-route,10.20.0.0/16,10.9.0.2")
    options = (f"--dhcp-option={option}" for option in (*more, "option:router,10.9.0.1"))
    with leased.router.dhcp_server(RANGE, *options):
        await leased.renewed(client, "10.9.0.50/24")
        # Where there are classless routes, the router counts for nothing.
        assert (await shell(client, look)).splitlines() == [
            "10.20.0.0/16 via 10.9.0.2",
            "mtu 1400",
        ]
    with leased.router.dhcp_server(RANGE, "--dhcp-option=option:mtu,1500", *OPTIONS):
        await leased.renewed(client, "10.9.0.50/24")
        assert (await shell(client, look)).splitlines() == [
            "default via 10.9.0.1",
            "mtu 1500",
        ]
    # Nor does it stay when there is no router any more.
    with leased.router.dhcp_server(RANGE, "--dhcp-option=option:router"):
        await leased.renewed(client, "10.9.0.50/24")
        assert await shell(client, look) == "mtu 1500\n"


async def test_words_come_before_what_a_server_says_and_the_lease_is_given_back_at_the_end(
    tmp_path: Path,
) -> None:
    words = ("ip=dhcp", "gateway=10.9.0.3", "dns=10.9.0.77", "mtu=1300")
    with (
        router(tmp_path / "router", "10.9.0.1/24") as there,
        there.dhcp_server(RANGE, "--dhcp-option=option:mtu,1400", *OPTIONS),
        booted(
            tmp_path,
            linked_to=there.pid,
            options=[f"--append=innkeep.{word}" for word in words],
        ) as machine,
    ):
        async with open_client(machine.address) as client:
            assert await problems(client) == ()
            assert await addresses(client) == ["10.9.0.50/24"]
            assert "default via 10.9.0.3 dev eth0" in await shell(client, "ip route")
            assert "mtu 1300" in await shell(client, "ip link show eth0")
            assert await shell(client, "cat /etc/resolv.conf") == (
                "search one.test two.test\nnameserver 10.9.0.77\n"
            )
            assert "10.9.0.50" in there.leases()
            assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})
            # Before the answer: afterwards the power may go.
            await until(lambda: there.leases() == "", tmp_path / "router", 20)


async def test_a_lease_that_is_lost_is_told_until_there_is_another(
    leased: Leased, client: AgentClient
) -> None:
    with leased.router.dhcp_server(RANGE):
        await leased.renewed(client, "10.9.0.50/24")
        await leased.released(client)
        assert await problems(client) == ("the DHCP lease of 10.9.0.50/24 is over",)
        assert await addresses(client) == []
        await leased.renewed(client, "10.9.0.50/24")
        assert await problems(client) == ()


async def test_a_lease_that_is_lost_while_no_agent_is_there_is_taken_back_by_the_next(
    leased: Leased, client: AgentClient
) -> None:
    with leased.router.dhcp_server(RANGE):
        await leased.renewed(client, "10.9.0.50/24")
        said = len(leased.machine.console_text())
        # It dies before it can start what would take the address away.
        agent = "$(cat /sys/fs/cgroup/agent/cgroup.procs)"
        with pytest.raises(ConnectionFailed):
            await shell(client, f"kill -9 {agent}; kill -USR2 $({CLIENT})")
        await leased.told("the DHCP lease of 10.9.0.50/24 is over", said)
    async with open_client(leased.machine.address) as anew:
        assert await problems(anew) == ("the DHCP lease of 10.9.0.50/24 is over",)
        assert await addresses(anew) == []


async def test_a_lease_that_nobody_renews_ends_with_its_time(
    leased: Leased, client: AgentClient
) -> None:
    with leased.router.dhcp_server(RANGE):
        await leased.renewed(client, "10.9.0.50/24")
        await leased.released(client)
    # 16 s are the least that udhcpc goes by.
    with leased.router.short_leases(16):
        await leased.renewed(client, "10.9.0.90/24")
    said = len(leased.machine.console_text())
    # What the kernel does to the address when even the client is gone, it is told at once.
    assert re.search(r"valid_lft 1\dsec", await shell(client, "ip -4 address show eth0"))
    await leased.told("the DHCP lease of 10.9.0.90/24 is over", said)
    assert await addresses(client) == []


async def test_a_client_that_is_killed_is_started_again_and_keeps_the_address(
    leased: Leased, client: AgentClient
) -> None:
    with leased.router.dhcp_server(RANGE):
        await leased.renewed(client, "10.9.0.50/24")
        said = len(leased.machine.console_text())
        pid = await shell(client, f"{CLIENT}; kill -9 $({CLIENT})")
        await leased.told("lease of 10.9.0.50 obtained", said)
        assert await addresses(client) == ["10.9.0.50/24"]
        assert await shell(client, "pidof udhcpc") != pid
        assert await problems(client) == ()
