"""The host's SSH agent, forwarded: byte for byte, half-closes included."""

import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.network import ssh_agent
from agent.network.host import Host
from protocol.constants import Port
from tests.support.commands import run
from tests.support.host_ports import HostPorts
from tests.support.ssh import ssh_agent as real_ssh_agent

PATIENCE_S = 10


@pytest.fixture
async def path(host: Host, tmp_path: Path) -> AsyncIterator[Path]:
    """The socket that the agent serves."""
    where = tmp_path / "ssh-agent.sock"
    async with serving(where, host):
        yield where


@asynccontextmanager
async def serving(path: Path, host: Host) -> AsyncIterator[None]:
    with ssh_agent.listening(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ssh_agent.serve, listener, host)
            with trio.fail_after(PATIENCE_S):
                yield
            nursery.cancel_scope.cancel()


async def everything(stream: trio.SocketStream) -> bytes:
    """What comes until the end."""
    return b"".join([piece async for piece in stream])


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def send_for_ever(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"nobody hears this")


async def test_opensshs_own_client_and_agent_understand_each_other(
    path: Path, ports: HostPorts, tmp_path: Path
) -> None:
    with real_ssh_agent(ports.prefix, tmp_path) as key:
        add = partial(run, "ssh-add", "-l", env={"SSH_AUTH_SOCK": str(path)})
        assert (await trio.to_thread.run_sync(add)).decode() == key


async def test_megabytes_pass_both_ways_at_once(path: Path, ports: HostPorts) -> None:
    data = os.urandom(5_000_001)
    received = bytearray()
    async with (
        ports.served(Port.SSH_AGENT, echo),
        await trio.open_unix_socket(path) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client.send_all, data)
        while len(received) < len(data):
            received += await client.receive_some()
    assert received == data


async def test_a_client_that_has_said_all_still_gets_the_answer(
    path: Path, ports: HostPorts
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(b"heard: " + await everything(stream))

    async with ports.served(Port.SSH_AGENT, answer), await trio.open_unix_socket(path) as client:
        await client.send_all(b"all of it")
        await client.send_eof()
        assert await everything(client) == b"heard: all of it"


async def test_a_host_that_has_said_all_still_hears_the_client(
    path: Path, ports: HostPorts
) -> None:
    async with (
        ports.listening(Port.SSH_AGENT) as listener,
        await trio.open_unix_socket(path) as client,
        await listener.accept() as server,
    ):
        await server.send_all(b"only this")
        await server.send_eof()
        assert await everything(client) == b"only this"
        await client.send_all(b"more")
        await client.send_eof()
        assert await everything(server) == b"more"


async def test_the_last_words_of_a_host_that_hears_no_more_arrive(
    path: Path, ports: HostPorts
) -> None:
    async with (
        ports.listening(Port.SSH_AGENT) as listener,
        await trio.open_unix_socket(path) as client,
    ):
        async with await listener.accept() as server:
            await client.send_all(b"unread")
            await server.send_all(b"go away")
        assert await client.receive_some() == b"go away"
        assert await client.receive_some() == b""


async def test_a_connection_may_say_nothing_for_a_year(
    host: Host, ports: HostPorts, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "ssh-agent.sock"
    with ssh_agent.listening(path) as listener:
        async with ports.served(Port.SSH_AGENT, echo), trio.open_nursery() as nursery:
            nursery.start_soon(ssh_agent.serve, listener, host)
            async with await trio.open_unix_socket(path) as client:
                for said in (b"before", b"after"):
                    await client.send_all(said)
                    assert await client.receive_some() == said
                    mock_clock.jump(365 * 86_400)
            nursery.cancel_scope.cancel()


async def test_a_client_that_is_gone_takes_its_connection_to_the_host_along(
    path: Path, ports: HostPorts
) -> None:
    async with ports.listening(Port.SSH_AGENT) as listener:
        client = await trio.open_unix_socket(path)
        async with await listener.accept() as server:
            await client.send_all(b"and off")
            await client.aclose()
            assert await everything(server) == b"and off"
            with pytest.raises(trio.BrokenResourceError):
                await send_for_ever(server)


async def test_a_host_that_is_gone_takes_the_clients_connection_along(
    path: Path, ports: HostPorts
) -> None:
    async with (
        ports.listening(Port.SSH_AGENT) as listener,
        await trio.open_unix_socket(path) as client,
    ):
        await (await listener.accept()).aclose()
        assert await client.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await send_for_ever(client)


@pytest.mark.parametrize("left", [False, True], ids=["nothing there", "a socket left behind"])
async def test_without_an_agent_on_the_host_the_connection_is_closed_at_once(
    path: Path, ports: HostPorts, left: bool
) -> None:
    if left:
        with trio.socket.socket(trio.socket.AF_UNIX) as stale:
            await stale.bind(f"{ports.prefix}_{Port.SSH_AGENT}")
    for _ in range(3):
        async with await trio.open_unix_socket(path) as client:
            assert await client.receive_some() == b""


async def test_without_a_host_the_connection_is_closed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "alone.sock"
    async with (
        serving(path, Host(reachable=False)),
        await trio.open_unix_socket(path) as client,
    ):
        assert await client.receive_some() == b""


async def test_connections_beyond_the_limit_wait_for_others_to_end(
    path: Path, ports: HostPorts
) -> None:
    async with ports.listening(Port.SSH_AGENT) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, echo, [listener])
        clients = [await trio.open_unix_socket(path) for _ in range(ssh_agent.AT_ONCE + 1)]
        *served, waiting = clients
        for client in served:
            await client.send_all(b"x")
            assert await client.receive_some() == b"x"
        await waiting.send_all(b"x")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            received_already(waiting)
        await served[0].aclose()
        assert await waiting.receive_some() == b"x"
        for client in clients:
            await client.aclose()
        nursery.cancel_scope.cancel()


def received_already(stream: trio.SocketStream) -> bytes:
    """What can be read without waiting. Raises BlockingIOError."""
    with socket.socket(fileno=os.dup(stream.socket.fileno())) as plain:
        return plain.recv(1, socket.MSG_DONTWAIT)


def test_everyone_in_the_vm_may_connect(tmp_path: Path) -> None:
    with ssh_agent.listening(tmp_path / "for-all.sock"):
        assert stat.S_IMODE((tmp_path / "for-all.sock").stat().st_mode) == 0o666


def test_what_a_killed_agent_left_is_replaced_and_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    left = path.stat().st_ino
    with ssh_agent.listening(path):
        assert path.stat().st_ino != left
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_somebody_serves_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ours.sock"
    with ssh_agent.listening(path):
        with pytest.raises(OSError, match="in use"), ssh_agent.listening(path):
            pass
        assert path.is_socket()
