"""A request's two-way line, over real sockets."""

import socket
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from agent.channel import Channel
from agent.connection import Connection, PeerGone
from agent.hangup import HangupWatch
from protocol import AgentResponse, Envelope, decode, encode, encode_frame, requests, responses
from protocol.errors import FrameTooLarge, MalformedMessage
from protocol.framing import FrameDecoder

PING = encode_frame(encode(requests.Ping()))
RESIZE = encode_frame(encode(requests.Resize(cols=80, rows=24)))


def stdin(data: bytes) -> bytes:
    return encode_frame(encode(requests.Stdin(data)))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def channel(ends: tuple[socket.socket, socket.socket]) -> Channel:
    return Channel(Connection(ends[0]))


async def test_requests_arrive_in_order_however_the_bytes_are_cut(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _send_byte_by_byte() -> None:
            for byte in PING + RESIZE:
                ends[1].send(bytes([byte]))
                await trio.lowlevel.checkpoint()

        assert await channel.next_request() == Envelope(None, requests.Ping())
        assert await channel.next_request() == Envelope(None, requests.Resize(80, 24))


async def test_a_cancelled_receive_loses_no_byte(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(PING[:7])
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.next_request)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    ends[1].send(PING[7:])
    assert await channel.next_request() == Envelope(None, requests.Ping())


async def test_a_receive_that_is_cancelled_when_bytes_are_there_loses_none(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(PING)
    with trio.CancelScope() as scope:
        scope.cancel()
        await channel.next_request()
    assert channel.pending_request() == Envelope(None, requests.Ping())


async def test_a_message_that_cannot_be_read_leaves_the_next_one_readable(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(encode_frame(b'{"method":"ping"') + PING)
    with pytest.raises(MalformedMessage):
        await channel.next_request()
    assert await channel.next_request() == Envelope(None, requests.Ping())


async def test_a_half_close_is_the_end_of_requests_and_answers_still_go_out(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(PING)
    ends[1].shutdown(socket.SHUT_WR)
    assert await channel.next_request() == Envelope(None, requests.Ping())
    assert await channel.next_request() is None
    assert await channel.next_request() is None
    await channel.send(responses.Pong(version=1))
    decoder = FrameDecoder()
    decoder.receive_data(ends[1].recv(4096))
    payload = decoder.next_frame()
    assert payload is not None
    assert decode(payload, AgentResponse).body == responses.Pong(version=1)


async def test_an_oversize_frame_is_refused_before_its_bytes_arrive(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].send(bytes.fromhex("02000001"))
    with pytest.raises(FrameTooLarge):
        await channel.next_request()


async def test_sending_to_a_peer_that_is_gone_says_so(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    ends[1].close()
    with pytest.raises(PeerGone):
        await channel.send(responses.Started())


async def test_a_large_answer_arrives_whole_while_the_reader_is_slow(
    channel: Channel, ends: tuple[socket.socket, socket.socket]
) -> None:
    answer = responses.Stdout(bytes(range(256)) * 8192)
    decoder = FrameDecoder()
    theirs = trio.socket.from_stdlib_socket(ends[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.send, answer)
        while (payload := decoder.next_frame()) is None:
            decoder.receive_data(await theirs.recv(1000))
    assert decode(payload, AgentResponse).body == answer


class TestFollowUps:
    async def test_those_of_the_asked_kinds_are_taken_as_they_come(
        self, channel: Channel, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        ends[1].send(stdin(b"abc") + RESIZE)
        kinds = (requests.Stdin, requests.Resize)
        assert await channel.follow_up(*kinds) == requests.Stdin(b"abc")
        assert await channel.follow_up(*kinds) == requests.Resize(80, 24)

    async def test_any_other_request_ends_them_and_waits_for_the_session(
        self, channel: Channel, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        ends[1].send(PING + stdin(b"later"))
        assert await channel.follow_up(requests.Stdin) is None
        assert await channel.follow_up(requests.Stdin) is None
        assert await channel.next_request() == Envelope(None, requests.Ping())
        assert await channel.next_request() == Envelope(None, requests.Stdin(b"later"))

    async def test_a_message_that_cannot_be_read_waits_for_the_session_too(
        self, channel: Channel, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        ends[1].send(encode_frame(b"nonsense"))
        assert await channel.follow_up(requests.Stdin) is None
        with pytest.raises(MalformedMessage):
            await channel.next_request()

    async def test_the_end_of_the_peers_requests_ends_them(
        self, channel: Channel, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        ends[1].shutdown(socket.SHUT_WR)
        assert await channel.follow_up(requests.Stdin) is None
        assert await channel.next_request() is None


async def test_what_waits_for_the_answer_runs_once_and_after_it(channel: Channel) -> None:
    ran: list[str] = []
    channel.once_answered(lambda: ran.append("then"))
    channel.answered()
    channel.answered()
    assert ran == ["then"]


class TestHangUps:
    async def test_a_close_is_noticed_behind_unread_bytes(
        self, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        watch = HangupWatch()
        noticed = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            with watch.watching(ends[0], noticed.set):
                ends[1].send(b"x" * 100_000)
                ends[1].close()
                with trio.fail_after(5):
                    await noticed.wait()
            nursery.cancel_scope.cancel()

    async def test_a_half_close_of_a_unix_socket_is_none(
        self, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        watch = HangupWatch()
        noticed = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            with watch.watching(ends[0], noticed.set):
                ends[1].shutdown(socket.SHUT_WR)
                await trio.testing.wait_all_tasks_blocked()
                assert not noticed.is_set()
            nursery.cancel_scope.cancel()

    async def test_one_outside_the_watch_is_nobodys_business(
        self, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        watch = HangupWatch()
        noticed = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            with watch.watching(ends[0], noticed.set):
                pass
            ends[1].close()
            await trio.testing.wait_all_tasks_blocked()
            assert not noticed.is_set()
            nursery.cancel_scope.cancel()

    async def test_what_had_arrived_before_it_can_still_be_read(
        self, channel: Channel, ends: tuple[socket.socket, socket.socket]
    ) -> None:
        ends[1].send(encode_frame(b"nonsense") + PING + RESIZE[:5])
        ends[1].close()
        assert channel.pending_request() == Envelope(None, requests.Ping())
        assert channel.pending_request() is None
