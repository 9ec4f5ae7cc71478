"""A real name server on the host's side, and the filter between it and a machine."""

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio
from attrs import frozen

from protocol.constants import Port
from tests.support.commands import find_program, run
from tests.support.host_ports import HostPorts
from tests.support.loopback import own_address

MANY = 120
"""Addresses that many.test has: more than fit a datagram of 512 bytes or of 1232."""

_PORT = 5300
_CONNECTIONS = 8
# As many as dnsmasq answers on one of them.
_QUERIES = 100


ASK_AT_ONCE = """
import socket, struct, sys
many = int(sys.argv[1])
udp = socket.socket(type=socket.SOCK_DGRAM)
udp.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE
udp.connect(("127.0.0.1", 53))
for number in range(many):
    name = f"n{number}".encode()
    question = bytes([len(name)]) + name + b"\\4test\\0" + struct.pack("!HH", 1, 1)
    udp.send(struct.pack("!HHHHHH", number, 0x0100, 1, 0, 0, 0) + question)
udp.settimeout(30)
for _ in range(many):
    answer = udp.recv(65535)
    number, flags = struct.unpack_from("!HH", answer)
    # The record begins with a pointer to the name, and ten bytes of other things.
    address = answer.index(b"\\xc0\\x0c") + 12
    print(number, flags & 0xF, socket.inet_ntoa(answer[address:address + 4]))
"""
"""A Python program that asks for so many names at once as its argument says: see `answered`."""


def answered(many: int) -> list[str]:
    """What it prints, sorted, when all are answered."""
    return sorted(f"{number} 0 192.0.2.1" for number in range(many))


@contextmanager
def name_server() -> Iterator[str]:
    """dnsmasq at a loopback address of its own, for the block; see `filtered`.

    Every name below `test` is 192.0.2.1, many.test has 120 addresses, and large.test a text that
    fits no datagram of a usual size. All others do not exist.
    """
    address = own_address(0)
    argv = [
        find_program("dnsmasq"),
        *("--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--log-facility=-"),
        *("--no-resolv", "--no-hosts", "--no-poll", f"--listen-address={address}"),
        *("--bind-interfaces", f"--port={_PORT}", "--user=root", "--edns-packet-max=4096"),
        "--address=/test/192.0.2.1",
        "--local=/#/",
        *(f"--host-record=many.test,192.0.2.{number + 1}" for number in range(MANY)),
        "--txt-record=large.test," + ",".join("x" * 200 for _ in range(30)),
    ]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if b"started" in line:
                    break
            yield address
        finally:
            process.terminate()
            process.communicate()


@asynccontextmanager
async def filtered(ports: HostPorts, name_server: str) -> AsyncIterator[None]:
    """The host's filter for the block, which lets everything through to that name server."""
    # A process of dnsmasq's sees to each connection, one query after the other.
    upstream = trio.CapacityLimiter(_CONNECTIONS)
    idle: list[tuple[trio.SocketStream, int]] = []

    async def ask(stream: trio.SocketStream) -> None:
        query = await framed(stream)
        async with upstream:
            if idle:
                server, left = idle.pop()
            else:
                server, left = await trio.open_tcp_stream(name_server, _PORT), _QUERIES
            await server.send_all(query)
            answer = await framed(server)
            if left > 1:
                idle.append((server, left - 1))
            else:
                await server.aclose()
        await stream.send_all(answer)

    async with ports.served(Port.DNS_FILTER, ask):
        yield
    for server, _ in idle:
        await server.aclose()


async def framed(stream: trio.SocketStream) -> bytes:
    """One message with the two bytes of its length. Raises EOFError at the end."""
    data = b""
    while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
        piece = await stream.receive_some()
        if not piece:
            raise EOFError("half a message")
        data += piece
    return data


@frozen
class Dig:
    """What `dig` prints, asked in a network that its words `enter` begin in."""

    enter: tuple[str, ...] = ()
    server: str = "127.0.0.1"

    async def __call__(self, name: str, *options: str) -> str:
        argv = (*self.enter, "dig", f"@{self.server}", name, *options)
        return (await trio.to_thread.run_sync(lambda: run(*argv))).decode()

    async def short(self, name: str, *options: str) -> list[str]:
        """The data of the answer's records."""
        return (await self(name, "+short", *options)).split("\n")[:-1]
