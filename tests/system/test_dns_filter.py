"""Names resolved by the host, in a machine whose network has nothing else."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen

from initramfs.local_registry import LocalRegistry
from protocol.client import open_client
from tests.support.commands import run as run_here
from tests.support.crash import kill_agent
from tests.support.execution import execute, pull, run, shell
from tests.support.host_ports import HostPorts
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.name_server import ASK_AT_ONCE, Dig, answered, filtered, name_server
from tests.support.wire import Answer, open_wire


@frozen
class Filtering:
    """A machine that asks its host, and an image in its store."""

    machine: Machine
    ports: HostPorts
    image: str

    @property
    def dig(self) -> Dig:
        return Dig(self.machine.enter_network)


@pytest.fixture(scope="module")
def filtering(
    registry: LocalRegistry, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Filtering]:
    directory = tmp_path_factory.mktemp("filtering")
    image = images.busybox.reference

    async def pull_image(address: str) -> None:
        async with open_client(address) as client:
            await pull(client, image)

    with booted(directory, insecure_registries=[registry.address]) as machine:
        trio.run(pull_image, machine.address)
    options = ["--append=innkeep.dns_filter=1"]
    with booted(directory, in_own_network=True, options=options) as machine:
        yield Filtering(machine, HostPorts(directory / "agent.sock"), image)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with name_server() as address:
        yield address


@pytest.fixture
async def dig(filtering: Filtering, server: str) -> AsyncIterator[Dig]:
    """Asks the machine's filter, whose host lets everything through."""
    async with filtered(filtering.ports, server):
        yield filtering.dig


async def test_the_machine_and_its_containers_resolve_names_by_the_filter(
    filtering: Filtering, dig: Dig
) -> None:
    async with open_client(filtering.machine.address) as client:
        assert await shell(client, "cat /etc/resolv.conf") == "nameserver 127.0.0.1\n"
        resolve = "import socket; print(socket.gethostbyname('a.test'))"
        done = await execute(client, "python3", "-I", "-S", "-c", resolve)
        assert done.stdout == b"192.0.2.1\n", done
        done = await run(client, filtering.image, "nslookup", "a.test")
        assert b"192.0.2.1" in done.stdout, done
        done = await run(client, filtering.image, "nslookup", "nowhere.example")
        assert b"NXDOMAIN" in done.stdout + done.stderr


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
async def test_dig_is_answered_on_port_53(dig: Dig, transport: str) -> None:
    assert await dig.short("a.test", transport) == ["192.0.2.1"]
    assert len(await dig.short("many.test", transport, "+bufsize=4096")) == 120


async def test_a_thousand_queries_at_once_are_all_answered(filtering: Filtering, dig: Dig) -> None:
    argv = (*filtering.machine.enter_network, "python3", "-c", ASK_AT_ONCE, "1000")
    printed = await trio.to_thread.run_sync(partial(run_here, *argv))
    assert sorted(printed.decode().splitlines()) == answered(1000)


async def test_a_thousand_queries_at_once_on_one_connection_are_all_answered(
    filtering: Filtering, dig: Dig, tmp_path: Path
) -> None:
    names = tmp_path / "names"
    names.write_text("".join(f"n{number}.test\n" for number in range(1000)))
    # dig's sibling asks all of them before it hears of the first. By UDP it would not do: it takes
    # one port for two of so many queries, and the answer to one of these for the other's.
    argv = (*filtering.machine.enter_network, "mdig", "@127.0.0.1", "-f", names, "+tcp")
    printed = await trio.to_thread.run_sync(
        partial(run_here, *argv, "+noall", "+answer", "+time=30", "+tries=1")
    )
    answers = [line.split() for line in printed.decode().splitlines()]
    assert sorted((each[0], each[-1]) for each in answers) == sorted(
        (f"n{number}.test.", "192.0.2.1") for number in range(1000)
    )


async def test_without_a_filter_on_the_host_names_fail_at_once(filtering: Filtering) -> None:
    assert "status: SERVFAIL" in await filtering.dig("a.test", "+tries=1")
    assert "status: SERVFAIL" in await filtering.dig("a.test", "+tcp", "+tries=1")


async def test_a_report_says_how_far_a_url_is_reached(filtering: Filtering, dig: Dig) -> None:
    async with open_wire(filtering.machine.address) as wire:
        answer = await wire.ask("network_test", url="http://nowhere.example/")
        assert answer["status"] == "ok"
        report = reported(answer)
        assert list(report) == ["ok", "dns", "tcp", "http"]
        assert report["ok"] is False
        assert list(report["dns"]) == ["ok", "duration_ms", "error", "addresses"]
        assert report["dns"]["ok"] is False
        assert report["dns"]["error"] == "Name or service not known"
        assert report["tcp"]["error"] == report["http"]["error"] == "not tried"
        # It has a name, and the machine no way to it.
        report = reported(await wire.ask("network_test", url="http://a.test/"))
        assert report["dns"]["addresses"] == ["192.0.2.1"]
        assert report["tcp"]["error"] == "Network is unreachable: 192.0.2.1:80"
        assert report["http"] == {
            "ok": False,
            "duration_ms": 0,
            "error": "not tried",
            "status": None,
        }


def reported(answer: Answer) -> dict[str, Any]:
    assert isinstance(answer["data"], dict)
    return answer["data"]


async def test_the_next_agent_serves_after_ones_death(filtering: Filtering, dig: Dig) -> None:
    await kill_agent(filtering.machine)
    async with open_client(filtering.machine.address) as client:
        await shell(client, "true")
    assert await dig.short("a.test", "+notcp") == ["192.0.2.1"]
    assert await dig.short("a.test", "+tcp") == ["192.0.2.1"]
