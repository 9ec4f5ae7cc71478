"""The host's client over real sockets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from protocol import ProtocolError, requests, responses
from protocol.address import InvalidAddress
from protocol.client import AgentClient, AgentRefused, ConnectionFailed, open_client
from protocol.constants import VSOCK_SEND_SIZE
from tests.protocol.fake_agent import Peer, Script, echo_chunks, serving

PULL = requests.Pull("alpine")
PROGRESS = [responses.Progress("Pulling layer 1/1", percent) for percent in (0, 50, 100)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


async def test_a_request_gives_the_last_answer_whatever_came_before(path: Path) -> None:
    script = Script(
        {
            requests.Ping: [[responses.Pong(1)]],
            requests.Pull: [[*PROGRESS, responses.Ok({"digest": "d"})]],
            requests.FileRead: [
                [responses.DataChunk(b"a", done=False), responses.DataChunk(b"", done=True)]
            ],
            requests.VmExec: [
                [responses.Started(), responses.Stdout(b"o"), responses.Exited(3)],
                [responses.Started(), responses.Error("gone", "WAIT_FAILED")],
            ],
        }
    )
    async with serving(path, script) as address, open_client(address) as client:
        assert await client.request(requests.Ping()) == responses.Pong(1)
        assert await client.request(PULL) == responses.Ok({"digest": "d"})
        assert await client.request(requests.FileRead("/x")) == responses.DataChunk(b"", True)
        execution = requests.VmExec(("ls",), interactive=True)
        assert await client.request(execution) == responses.Exited(3)
        assert await client.request(execution) == responses.Error("gone", "WAIT_FAILED")


async def test_a_stream_gives_every_answer_and_ends_after_the_last(path: Path) -> None:
    script = Script({requests.Pull: [[*PROGRESS, responses.Ok()]]})
    async with serving(path, script) as address, open_client(address) as client:
        for _ in range(2):
            async with client.stream(PULL) as answers:
                assert [answer async for answer in answers] == [*PROGRESS, responses.Ok()]


async def test_asking_for_an_answer_raises_what_the_agent_refused(path: Path) -> None:
    script = Script(
        {
            requests.Query: [[responses.Error("image not found: x", "NOT_FOUND")]],
            requests.Ping: [[responses.Ok()]],
        }
    )
    async with serving(path, script) as address, open_client(address) as client:
        with pytest.raises(AgentRefused, match="image not found: x") as refused:
            await client.ask(requests.Query("x"), responses.Ok)
        assert refused.value.code == "NOT_FOUND"
        with pytest.raises(ProtocolError, match="expected the answer pong, got ok"):
            await client.ask(requests.Ping(), responses.Pong)


async def test_a_trace_id_goes_with_its_request(path: Path) -> None:
    seen: list[str | None] = []

    async def conversation(peer: Peer) -> None:
        while await peer.receive() is not None:
            await peer.send(responses.Pong(1))
        seen.extend(peer.trace_ids)

    async with serving(path, conversation) as address:
        async with open_client(address) as client:
            await client.request(requests.Ping(), trace_id="t-1")
            await client.request(requests.Ping())
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert seen == ["t-1", None]


async def test_tasks_that_share_a_client_wait_for_each_other(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        while (request := await peer.receive()) is not None:
            assert isinstance(request, requests.Query)
            await peer.send(responses.Progress("…"), responses.Ok(request.image))

    answers: dict[str, object] = {}

    async def ask(client: AgentClient, image: str) -> None:
        answers[image] = (await client.ask(requests.Query(image), responses.Ok)).data

    async with (
        serving(path, conversation) as address,
        open_client(address) as client,
        trio.open_nursery() as nursery,
    ):
        for number in range(20):
            nursery.start_soon(ask, client, str(number))
    assert answers == {str(number): str(number) for number in range(20)}


async def test_follow_ups_go_out_while_answers_come_in(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await peer.receive()
        await peer.send(responses.Started())
        while isinstance(request := await peer.receive(), requests.Stdin) and request.data:
            await peer.send(responses.Stdout(request.data))
        await peer.send(responses.Exited(0))

    async with serving(path, conversation) as address, open_client(address) as client:
        received = b""
        async with client.stream(requests.VmExec(("cat",), interactive=True)) as answers:
            await client.send(requests.Stdin(b"one"))
            await client.send(requests.Stdin(b"two"))
            await client.send(requests.Stdin(b""))
            async for answer in answers:
                if isinstance(answer, responses.Stdout):
                    received += answer.data
        assert received == b"onetwo"


@pytest.mark.parametrize("message", [requests.Stdin(b""), requests.Resize(80, 24)])
async def test_what_is_never_answered_is_not_a_request(
    path: Path, message: requests.Stdin | requests.Resize
) -> None:
    script = Script({requests.Ping: [[responses.Pong(1)]]})
    async with serving(path, script) as address, open_client(address) as client:
        with pytest.raises(ValueError, match="has no answer"):
            await client.request(message)
        assert await client.request(requests.Ping()) == responses.Pong(1)


async def test_a_message_that_cannot_be_written_leaves_the_connection_as_it_is(path: Path) -> None:
    script = Script({requests.Ping: [[responses.Pong(1)]]})
    async with serving(path, script) as address, open_client(address) as client:
        with pytest.raises(ProtocolError, match="query cannot be written as JSON"):
            await client.request(requests.Query("\udcff"))
        with pytest.raises(ProtocolError, match="frame too large"):
            await client.request(requests.Query("x" * 2**25))
        assert await client.request(requests.Ping()) == responses.Pong(1)


async def test_big_frames_arrive_whole(path: Path) -> None:
    data = bytes(range(256)) * (20 * 4096)
    async with serving(path, echo_chunks) as address, open_client(address) as client:
        for size in (0, 1, 1024 * 1024, len(data)):
            answer = await client.request(requests.FileWriteChunk(data[:size], done=True))
            assert answer == responses.DataChunk(data[:size], done=True)


async def test_a_request_left_early_closes_the_connection(path: Path) -> None:
    hung_up = trio.Event()

    async def conversation(peer: Peer) -> None:
        await peer.receive()
        await peer.send(responses.Started())
        assert await peer.receive() is None
        hung_up.set()

    async with serving(path, conversation) as address, open_client(address) as client:
        async with client.stream(requests.VmExec(("cat",), interactive=True)) as answers:
            assert await anext(answers) == responses.Started()
        await hung_up.wait()
        with pytest.raises(ConnectionFailed, match=f"^{address}: the connection is closed$"):
            await client.request(requests.Ping())


async def test_a_cancelled_send_closes_the_connection(path: Path) -> None:
    full = trio.Event()
    hung_up = trio.Event()

    async def conversation(peer: Peer) -> None:
        await full.wait()
        while await peer.stream.receive_some():
            pass
        hung_up.set()

    async with serving(path, conversation) as address, open_client(address) as client:
        async with trio.open_nursery() as nursery:
            # More than the socket's buffers take.
            nursery.start_soon(client.send, requests.Stdin(bytes(8 * 1024 * 1024)))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        full.set()
        await hung_up.wait()
        with pytest.raises(ConnectionFailed, match="the connection is closed"):
            await client.send(requests.Stdin(b""))


async def test_an_agent_that_hangs_up_is_named(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await peer.receive()

    async with serving(path, conversation) as address, open_client(address) as client:
        with pytest.raises(
            ConnectionFailed, match=f"^{address}: the agent hung up before its answer$"
        ):
            await client.request(requests.Ping())


async def test_an_answer_that_is_none_is_a_protocol_error_and_closes(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await peer.receive()
        await peer.stream.send_all(b"\x00\x00\x00\x02{}")
        await peer.receive()

    async with serving(path, conversation) as address, open_client(address) as client:
        with pytest.raises(ProtocolError, match="status: expected a string"):
            await client.request(requests.Ping())
        with pytest.raises(ConnectionFailed):
            await client.request(requests.Ping())


async def test_no_single_send_is_longer_than_the_limit() -> None:
    sizes = []

    async def measure() -> None:
        sizes.append(len(sink.get_data_nowait()))

    sink = trio.testing.MemorySendStream(measure)
    stream = trio.StapledStream(sink, trio.testing.MemoryReceiveStream())
    client = AgentClient(stream, send_size=VSOCK_SEND_SIZE)
    await client.send(requests.Stdin(bytes(100_000)))
    assert sum(sizes) == 4 + len(b'{"method":"stdin","data":""}') + 133_336
    assert max(sizes) == VSOCK_SEND_SIZE


@asynccontextmanager
async def multiplexing(path: Path, target: Path, reply: bytes | None) -> AsyncIterator[None]:
    """A VMM's socket: CONNECT to port 6000 leads to the agent, unless it replies otherwise."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            line = b""
            while not line.endswith(b"\n"):
                line += await stream.receive_some(1)
            assert line == b"CONNECT 6000\n"
            if reply is not None:
                await stream.send_all(reply)
                return
            agent = await trio.open_unix_socket(str(target))
            # In two pieces, as a stream may deliver it.
            await stream.send_all(b"OK 10737")
            await stream.send_all(b"41824\n")
            async with agent, trio.open_nursery() as nursery:
                nursery.start_soon(pump, stream, agent)
                await pump(agent, stream)
                nursery.cancel_scope.cancel()

    async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()

    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(sock)])
        yield
        nursery.cancel_scope.cancel()


async def test_a_multiplexed_socket_leads_to_the_agent(tmp_path: Path, path: Path) -> None:
    mux = tmp_path / "v.sock"
    async with (
        serving(path, echo_chunks),
        multiplexing(mux, path, None),
        open_client(f"mux:{mux}:6000") as client,
    ):
        data = bytes(1024 * 1024)
        answer = await client.request(requests.FileWriteChunk(data, done=True))
        assert answer == responses.DataChunk(data, done=True)


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (b"", "nothing listens there"),
        (b"NO\n", r"it answered b'NO\\n'"),
        (b"x" * 1000, "it answered b'xxx"),
    ],
)
async def test_a_multiplexed_socket_without_the_port_says_so(
    tmp_path: Path, path: Path, reply: bytes, cause: str
) -> None:
    mux = tmp_path / "v.sock"
    async with multiplexing(mux, path, reply):
        with pytest.raises(ConnectionFailed, match=f"^cannot connect to mux:{mux}:6000: {cause}"):
            async with open_client(f"mux:{mux}:6000"):
                raise AssertionError


@pytest.mark.parametrize("kind", ["unix:{}", "mux:{}:6000"])
async def test_a_socket_that_is_not_there_is_one_line_with_its_address(
    path: Path, kind: str
) -> None:
    address = kind.format(path)
    with pytest.raises(
        ConnectionFailed, match=f"^cannot connect to {address}: No such file or directory$"
    ):
        async with open_client(address):
            raise AssertionError


async def test_a_path_too_long_for_a_socket_is_one_line_too(tmp_path: Path) -> None:
    with pytest.raises(ConnectionFailed, match="AF_UNIX path too long"):
        async with open_client(f"unix:{tmp_path}/{'x' * 200}"):
            raise AssertionError


async def test_a_guest_that_does_not_exist_is_one_line_with_its_address() -> None:
    # No VM has this CID; where there is no vsock at all, that is the cause.
    with trio.fail_after(20), pytest.raises(ConnectionFailed) as failed:
        async with open_client("vsock:4294967278:6000"):
            raise AssertionError
    assert str(failed.value).startswith("cannot connect to vsock:4294967278:6000: ")
    assert "\n" not in str(failed.value)


async def test_text_that_is_no_address_is_refused() -> None:
    with pytest.raises(InvalidAddress):
        async with open_client("localhost:6000"):
            raise AssertionError
