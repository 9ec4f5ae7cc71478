"""A VM whose host is asked, over a real vsock: its SSH agent, its DNS filter; and a shared root."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from attrs import frozen

from protocol.client import AgentClient, open_client
from tests.support.crash import kill_agent, kill_by
from tests.support.execution import execute, pull, run, shell
from tests.support.host_ports import HostPorts
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine, booted
from tests.support.name_server import ASK_AT_ONCE, answered, filtered, name_server
from tests.support.ssh import ssh_agent
from tests.support.watch import until

pytestmark = pytest.mark.timeout(180)

LIST = ("ssh-add", "-l")
# Emulated, on a machine that has other things to do as well, an agent takes its time to start.
PATIENCE_S = 120

# The agent's own code between a unix socket and the guest's loopback, which has half-closes.
BRIDGE = """
import sys
sys.path.insert(0, "/usr/lib/innkeep")
import socket, trio
from agent.network.ssh_agent import bridge

SENT = bytes(range(256)) * 8192

async def passes(one, other):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, SENT)
        heard = b""
        while len(heard) < len(SENT):
            heard += await other.receive_some()
    await one.send_eof()
    return heard == SENT and await other.receive_some() == b""

async def main():
    listener = trio.socket.socket(socket.AF_VSOCK)
    await listener.bind((socket.VMADDR_CID_ANY, 7001))
    listener.listen()
    host = trio.socket.socket(socket.AF_VSOCK)
    await host.connect((1, 7001))
    server, _ = await listener.accept()
    sockets = map(trio.socket.from_stdlib_socket, socket.socketpair())
    client, of_agent, host, server = map(trio.SocketStream, (*sockets, host, server))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bridge, of_agent, host)
        print(await passes(client, server), await passes(server, client))

trio.run(main)
"""


@frozen
class Hosted:
    """A VM that asks its host; `share` is what it has as the virtiofs share `root`."""

    machine: Machine
    ports: HostPorts
    image: str
    share: Path


@pytest.fixture(scope="module")
def hosted(
    vm_registry: str, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hosted]:
    directory = tmp_path_factory.mktemp("hosted")
    share = directory / "root"
    share.mkdir()
    image = images.clients.reference_from(LOOPBACK_IN_VM)

    async def pull_image(address: str) -> None:
        async with open_client(address) as client:
            await pull(client, image)

    with booted(
        directory,
        kind="auto",
        in_memory=True,
        insecure_registries=[vm_registry],
        options=[
            f"--share=root={share}",
            "--append=innkeep.ssh_agent=1",
            "--append=innkeep.dns_filter=1",
            "--append=innkeep.vsock_peers=1",
        ],
    ) as machine:
        trio.run(pull_image, machine.address)
        yield Hosted(machine, HostPorts(directory / "agent.sock"), image, share)


@pytest.fixture
async def client(hosted: Hosted) -> AsyncIterator[AgentClient]:
    async with open_client(hosted.machine.address) as connection:
        yield connection


async def test_the_hosts_keys_are_listed_in_a_container_and_after_the_agents_death(
    hosted: Hosted, client: AgentClient, tmp_path: Path
) -> None:
    refused = await run(client, hosted.image, *LIST)
    assert (refused.exit_code != 0, refused.stdout) == (True, b"")
    with ssh_agent(hosted.ports.prefix, tmp_path) as key:
        assert (await run(client, hosted.image, *LIST)).stdout.decode() == key
        stays = {"persistent_overlay_id": "stays"}
        assert (await run(client, hosted.image, *LIST, **stays)).stdout.decode() == key
        await kill_agent(hosted.machine)
        async with open_client(hosted.machine.address) as anew:
            assert (await run(anew, hosted.image, *LIST, **stays)).stdout.decode() == key


async def test_names_are_resolved_by_the_host_many_at_once(
    hosted: Hosted, client: AgentClient
) -> None:
    dig = ("dig", "+short", "many.test")
    with name_server() as server:
        async with filtered(hosted.ports, server):
            for transport in ("+notcp", "+tcp"):
                done = await run(client, hosted.image, *dig, transport, "+bufsize=4096")
                assert len(done.stdout.splitlines()) == 120, done
            done = await run(client, hosted.image, "nslookup", "a.test")
            assert b"192.0.2.1" in done.stdout
            done = await execute(client, "python3", "-I", "-S", "-c", ASK_AT_ONCE, "50")
            assert sorted(done.stdout.decode().splitlines()) == answered(50), done
    done = await run(client, hosted.image, "dig", "+tries=1", "a.test")
    assert b"status: SERVFAIL" in done.stdout


async def test_half_closes_pass_a_vsock(client: AgentClient) -> None:
    done = await execute(client, "python3", "-I", "-S", "-c", BRIDGE)
    assert (done.stdout, done.stderr) == (b"True True\n", b"")


async def test_a_shared_root_is_marked_when_the_vm_is_ready(
    hosted: Hosted, client: AgentClient
) -> None:
    await shell(client, "mkdir -p /oldroot && mount -t virtiofs root /oldroot")
    await kill_by(client)
    marker = hosted.share / ".smolvm-ready"
    await until(marker.exists, hosted.share, PATIENCE_S)
    told = int(marker.read_text())
    async with open_client(hosted.machine.address) as anew:
        uptime = await shell(anew, "cut -d' ' -f1 /proc/uptime; umount /oldroot")
    assert 0 < told <= float(uptime) * 1000
    assert f"ready {told // 1000}." in hosted.machine.console_text()
