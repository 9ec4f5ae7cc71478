"""The VM's name server: a real one on the host's side, and hosts that misbehave."""

import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing
from attrs import frozen

from agent.network import dns_filter
from agent.network.dns_message import failure, shortened, udp_limit
from agent.network.host import Host
from protocol.constants import Port
from tests.support.host_ports import HostPorts, Talk
from tests.support.loopback import own_address
from tests.support.name_server import MANY, Dig, filtered, framed, name_server

PATIENCE_S = 20
SERVFAIL = 2
ADDRESS = own_address(1)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with name_server() as address:
        yield address


@frozen
class Filter:
    """The agent's filter, at an address of its own."""

    address: str

    @property
    def dig(self) -> Dig:
        return Dig(server=self.address)

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(self.address, dns_filter.PORT)

    async def ask(self, query: bytes) -> bytes:
        """What a datagram is answered with."""
        with trio.socket.socket(type=socket.SOCK_DGRAM) as udp:
            await udp.connect((self.address, dns_filter.PORT))
            await udp.send(query)
            return await udp.recv(65535)


@pytest.fixture
async def filter_(host: Host) -> AsyncIterator[Filter]:
    with dns_filter.listening(ADDRESS) as sockets:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dns_filter.serve, sockets, host)
            with trio.fail_after(PATIENCE_S):
                yield Filter(ADDRESS)
            nursery.cancel_scope.cancel()


@pytest.fixture
async def dig(filter_: Filter, ports: HostPorts, server: str) -> AsyncIterator[Dig]:
    """Asks the filter, which has the real server behind it."""
    async with filtered(ports, server):
        yield filter_.dig


def query(name: str, identity: int = 7, udp_size: int | None = None) -> bytes:
    """A question for addresses."""
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    opt = b"" if udp_size is None else struct.pack("!BHHLH", 0, 41, udp_size, 0, 0)
    counts = (1, 0, 0, 1 if opt else 0)
    header = struct.pack("!HHHHHH", identity, 0x0100, *counts)
    return header + question + b"\0" + struct.pack("!HH", 1, 1) + opt


def identity_and_rcode(message: bytes) -> tuple[int, int]:
    identity, flags = struct.unpack_from("!HH", message)
    assert flags & 0x8000
    return identity, flags & 0xF


# With a real server


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
async def test_the_hosts_server_answers(dig: Dig, transport: str) -> None:
    assert await dig.short("a.test", transport) == ["192.0.2.1"]
    assert "status: NXDOMAIN" in await dig("nowhere.example", transport)


async def test_what_is_too_long_for_a_datagram_is_said_to_be_cut_short_and_had_by_tcp(
    dig: Dig,
) -> None:
    for name, lines in (("many.test", MANY), ("large.test", 1)):
        kind = "TXT" if name == "large.test" else "A"
        cut = await dig(name, kind, "+notcp", "+ignore", "+bufsize=1232")
        assert "flags: qr aa tc" in cut, cut
        assert "rcvd: " in cut
        assert int(cut.partition("rcvd: ")[2].split()[0]) <= 1232
        # dig asks again by TCP when it is told so.
        whole = await dig(name, kind, "+bufsize=1232")
        assert "(TCP)" in whole
        assert whole.count(f"\n{name}.") == lines


async def test_a_client_has_what_its_datagrams_can_hold(dig: Dig) -> None:
    without_edns = await dig("many.test", "+notcp", "+ignore", "+noedns")
    assert "flags: qr aa tc" in without_edns
    size = int(without_edns.partition("rcvd: ")[2].split()[0])
    # Whole records of 16 bytes.
    assert 512 - 16 < size <= 512
    assert without_edns.count("\nmany.test.") == (size - 27) // 16
    roomy = await dig("many.test", "+notcp", "+ignore", "+bufsize=4096")
    assert roomy.count("\nmany.test.") == MANY


async def test_one_connection_carries_many_queries_at_once(
    filter_: Filter, ports: HostPorts, server: str
) -> None:
    async with filtered(ports, server), await filter_.connect() as stream:
        wanted = {}
        for number in range(100):
            message = query(f"n{number}.test", number)
            wanted[number] = len(message)
            await stream.send_all(len(message).to_bytes(2, "big") + message)
        await stream.send_eof()
        data = b"".join([piece async for piece in stream])
    while data:
        length = int.from_bytes(data[:2], "big")
        identity, rcode = identity_and_rcode(data[2 : 2 + length])
        assert rcode == 0
        # One record of 16 bytes behind the question, which is as it was.
        assert length == wanted.pop(identity) + 16
        data = data[2 + length :]
    assert wanted == {}


# With hosts that are not as they should be


async def swallow(stream: trio.SocketStream) -> None:
    await framed(stream)
    await trio.sleep_forever()


async def hang_up(stream: trio.SocketStream) -> None:
    await framed(stream)


async def half(stream: trio.SocketStream) -> None:
    message = await framed(stream)
    await stream.send_all(message[:-1])


async def another(stream: trio.SocketStream) -> None:
    message = await framed(stream)
    await stream.send_all(message[:2] + b"\xff\xff\x80\0" + message[6:])


async def query_again(stream: trio.SocketStream) -> None:
    await stream.send_all(await framed(stream))


async def rubbish(stream: trio.SocketStream) -> None:
    await framed(stream)
    await stream.send_all(b"\0\3\7\7\7")


@pytest.mark.parametrize("talk", [hang_up, half, another, query_again, rubbish, None])
async def test_a_host_that_does_not_answer_is_a_failure_with_id_and_question_kept(
    filter_: Filter, ports: HostPorts, talk: Talk | None
) -> None:
    message = query("a.test", 4711)
    async with trio.open_nursery() as nursery:
        if talk is not None:
            await nursery.start(_served, ports, talk)
        reply = await filter_.ask(message)
        assert identity_and_rcode(reply) == (4711, SERVFAIL)
        assert reply[12:] == message[12:]
        async with await filter_.connect() as stream:
            await stream.send_all(len(message).to_bytes(2, "big") + message)
            assert (await framed(stream))[2:] == reply
        nursery.cancel_scope.cancel()


async def _served(
    ports: HostPorts, talk: Talk, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    async with ports.served(Port.DNS_FILTER, talk):
        task_status.started()
        await trio.sleep_forever()


async def test_a_host_that_is_silent_is_a_failure_after_a_while(
    host: Host, ports: HostPorts, autojump_clock: trio.testing.MockClock
) -> None:
    with dns_filter.listening(ADDRESS) as sockets:
        async with ports.served(Port.DNS_FILTER, swallow), trio.open_nursery() as nursery:
            nursery.start_soon(dns_filter.serve, sockets, host)
            reply = await Filter(ADDRESS).ask(query("a.test"))
            assert identity_and_rcode(reply) == (7, SERVFAIL)
            nursery.cancel_scope.cancel()


async def test_a_query_that_takes_its_time_holds_up_no_other(
    filter_: Filter, ports: HostPorts
) -> None:
    slow, go = trio.Event(), trio.Event()

    async def talk(stream: trio.SocketStream) -> None:
        message = await framed(stream)
        if b"slow" in message:
            slow.set()
            await go.wait()
        await stream.send_all(message[:4] + b"\x81\x80" + message[6:])

    async with ports.served(Port.DNS_FILTER, talk), await filter_.connect() as stream:
        answers = []
        for name in ("slow.test", "fast.test"):
            message = query(name)
            await stream.send_all(len(message).to_bytes(2, "big") + message)
        await slow.wait()
        answers.append(await framed(stream))
        assert b"fast" in answers[0]
        assert b"else" in await filter_.ask(query("else.test"))
        go.set()
        assert b"slow" in await framed(stream)


async def test_what_is_no_query_is_not_answered(filter_: Filter, ports: HostPorts) -> None:
    async def talk(stream: trio.SocketStream) -> None:
        message = await framed(stream)
        await stream.send_all(message[:4] + b"\x81\x80" + message[6:])

    async with ports.served(Port.DNS_FILTER, talk):
        with trio.socket.socket(type=socket.SOCK_DGRAM) as udp:
            await udp.connect((filter_.address, dns_filter.PORT))
            answer = b"\0\1\x81\x80" + query("a.test")[4:]
            for message in (b"", b"x", answer, query("b.test", 3)):
                await udp.send(message)
            assert (await udp.recv(65535))[:2] == b"\0\3"
        async with await filter_.connect() as stream:
            await stream.send_all(b"\0\1x")
            assert await stream.receive_some() == b""


# Messages by themselves


def test_a_failure_keeps_what_a_client_knows_its_query_by() -> None:
    asked = query("a.test", 99)
    assert failure(asked) == b"\0\x63\x81\x82\0\1\0\0\0\0\0\0" + asked[12:]
    with_edns = query("a.test", 99, udp_size=1232)
    # EDNS is answered with EDNS, RFC 6891 section 6.1.1.
    assert failure(with_edns) == (
        b"\0\x63\x81\x82\0\1\0\0\0\0\0\1" + asked[12:] + b"\0\0\x29\2\0\0\0\0\0\0\0"
    )
    # One whose question cannot be read has none in its answer.
    assert failure(asked[:-1]) == b"\0\x63\x81\x82\0\0\0\0\0\0\0\0"
    assert failure(asked[:12]) == b"\0\x63\x81\x82\0\0\0\0\0\0\0\0"


@pytest.mark.parametrize(
    ("asked", "limit"),
    [(None, 512), (0, 512), (512, 512), (1232, 1232), (4096, 4096), (65535, 65507)],
)
def test_the_size_of_datagrams_is_what_edns_says_and_at_least_512(
    asked: int | None, limit: int
) -> None:
    assert udp_limit(query("a.test", udp_size=asked)) == limit


def test_what_is_not_understood_is_not_cut() -> None:
    long = query("a.test") + b"x" * 1000
    assert shortened(long, 2000) == long
    with pytest.raises(ValueError, match="a label of an unknown kind"):
        shortened(b"\0\1\x81\x80\0\1\0\xff\0\0\0\0" + long[12:], 512)
    assert udp_limit(b"\0\1\1\0\0\1\0\0\0\0\0\1" + b"\x3f" * 20) == 512


def test_what_nobody_asked_for_may_be_missing_unsaid() -> None:
    record = b"\xc0\x0c" + struct.pack("!HHLH", 1, 1, 60, 4) + b"\xc0\0\2\1"
    sections = struct.pack("!HHHH", 1, 1, 0, 100)
    answer = b"\0\7\x81\x80" + sections + query("a.test")[12:] + record * 101
    kept = b"\0\7\x81\x80" + struct.pack("!HHHH", 1, 1, 0, 0) + query("a.test")[12:] + record
    assert shortened(answer, 512) == kept


def test_no_prefix_of_a_message_and_no_change_of_a_byte_is_more_than_refused() -> None:
    whole = query("many.test", udp_size=1232)
    for end in range(12, len(whole)):
        udp_limit(whole[:end])
        failure(whole[:end])
    for at in range(12, len(whole)):
        for value in (0, 1, 0x3F, 0x40, 0xC0, 0xFF):
            changed = whole[:at] + bytes([value]) + whole[at + 1 :]
            assert 512 <= udp_limit(changed) <= 65507
            assert len(failure(changed)) >= 12
