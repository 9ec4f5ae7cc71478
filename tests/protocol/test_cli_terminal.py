"""`innkeep run -it` and `innkeep exec -it` on a real terminal, with an agent to look after."""

import os
import signal
from pathlib import Path

import pytest
import trio

from protocol import AgentResponse, requests, responses
from protocol.requests import Resize
from tests.protocol.fake_agent import Conversation, Peer, serving
from tests.protocol.sessions import all_input, begin, some_input
from tests.protocol.terminal import SIZE, on_terminal

READY = responses.Stdout(b"ready")
BYE = responses.Stdout(b"bye")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


async def begin_on_terminal(peer: Peer) -> None:
    """Hear a request and the first size, and say that the command runs and is ready."""
    await peer.receive()
    assert isinstance(await peer.receive(), Resize)
    await peer.send(responses.Started(), READY)


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (["exec", "-it", "sh"], requests.VmExec(("sh",), interactive=True, tty=True)),
        (["run", "-ti", "alpine"], requests.Run("alpine", (), interactive=True, tty=True)),
        (["run", "alpine", "-i", "-t"], requests.Run("alpine", (), interactive=True, tty=True)),
        (["exec", "-t", "top"], requests.VmExec(("top",), interactive=True, tty=True)),
    ],
)
async def test_the_size_follows_the_request_and_each_change_of_it(
    path: Path, arguments: list[str], request_: requests.AgentRequest
) -> None:
    heard: list[object] = []

    async def conversation(peer: Peer) -> None:
        heard.extend([await peer.receive(), await peer.receive()])
        await peer.send(responses.Started(), READY)
        while not isinstance(message := await peer.receive(), Resize):
            assert message == requests.Stdin(b"")
        heard.append(message)
        await peer.send(responses.Exited(0))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, *arguments, size=(132, 50)) as terminal,
    ):
        await terminal.see("ready")
        terminal.resize(200, 61)
        assert await terminal.exit_code() == 0
    assert heard == [request_, Resize(132, 50), Resize(200, 61)]


async def test_a_size_that_changes_before_the_start_is_told_after_it(path: Path) -> None:
    asked, resized = trio.Event(), trio.Event()
    heard: list[object] = []

    async def conversation(peer: Peer) -> None:
        await peer.receive()
        heard.append(await peer.receive())
        asked.set()
        await resized.wait()
        await peer.send(responses.Started())
        heard.append(await peer.receive())
        await peer.send(responses.Exited(0))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "sh") as terminal,
    ):
        await asked.wait()
        terminal.resize(100, 30)
        resized.set()
        assert await terminal.exit_code() == 0
    assert heard == [Resize(*SIZE), Resize(100, 30)]


async def test_a_terminal_that_does_not_know_its_size_leaves_it_to_the_agent(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(READY)
        assert await some_input(peer, 1) == b"x"
        await peer.send(responses.Exited(0))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "sh", size=(0, 0)) as terminal,
    ):
        await terminal.see("ready")
        await terminal.type("x")
        assert await terminal.exit_code() == 0


async def test_the_size_is_that_of_the_input_where_output_is_no_terminal(
    path: Path, tmp_path: Path
) -> None:
    async def conversation(peer: Peer) -> None:
        await peer.receive()
        assert await peer.receive() == Resize(*SIZE)
        await peer.send(responses.Started(), responses.Stdout(b"a\r\n"), responses.Exited(0))

    output = os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT)
    try:
        async with (
            serving(path, conversation) as address,
            on_terminal(address, "exec", "-it", "ls", stdout=output) as terminal,
        ):
            assert await terminal.exit_code() == 0
            assert await terminal.rest() == b""
    finally:
        os.close(output)
    assert (tmp_path / "output").read_bytes() == b"a\r\n"


async def test_every_key_is_a_byte_for_the_command(path: Path) -> None:
    keys = "\x03\x1a\x1c\x04\x11\x13\x16\x7f\r\n\t\x1b[A\x00é"

    async def conversation(peer: Peer) -> None:
        await begin_on_terminal(peer)
        assert await some_input(peer, len(keys.encode())) == keys.encode()
        await peer.send(BYE, responses.Exited(5))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "sh") as terminal,
    ):
        await terminal.see("ready")
        assert terminal.is_raw
        await terminal.type(keys)
        # Nothing was echoed here: what is typed is the command's to show.
        assert await terminal.rest() == b"bye"
        assert await terminal.exit_code() == 5


async def test_what_the_command_draws_is_on_the_screen_as_it_is(path: Path) -> None:
    drawing = b"\x1b[2J\x1b[1;1H~\n~\r\n\x07\xff"

    async def conversation(peer: Peer) -> None:
        await begin_on_terminal(peer)
        await peer.send(responses.Stdout(drawing), responses.Exited(0))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "vi") as terminal,
    ):
        await terminal.see("ready")
        assert await terminal.rest() == drawing


async def test_keys_come_one_by_one_and_in_order(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await begin_on_terminal(peer)
        for _ in range(200):
            await peer.send(responses.Stdout(await some_input(peer, 1)))
        await peer.send(responses.Exited(0))

    text = "".join(chr(ord("a") + n % 26) for n in range(200))
    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "cat") as terminal,
    ):
        await terminal.see("ready")
        for key in text:
            await terminal.type(key)
            await terminal.see(key)
        assert await terminal.exit_code() == 0


async def ends(peer: Peer) -> None:
    await peer.send(responses.Exited(7))


async def fails(peer: Peer) -> None:
    await peer.send(responses.Error("lost sight of it", "WAIT_FAILED"))


async def hangs_up(_: Peer) -> None:
    return


async def talks_nonsense(peer: Peer) -> None:
    await peer.stream.send_all(b"\x00\x00\x00\x02{}")
    await peer.receive()


@pytest.mark.parametrize(
    ("end", "exit_code", "message"),
    [
        (ends, 7, b""),
        (fails, 125, b"innkeep: lost sight of it\r\n"),
        (hangs_up, 125, b"the agent hung up before its answer\r\n"),
        (
            talks_nonsense,
            125,
            b"innkeep: status: expected a string, got nothing: the field is missing\r\n",
        ),
    ],
)
async def test_the_terminal_is_as_before_however_the_agent_ends_it(
    path: Path, end: Conversation, exit_code: int, message: bytes
) -> None:
    go_on = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin_on_terminal(peer)
        await go_on.wait()
        await end(peer)

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "sh") as terminal,
    ):
        before = terminal.modes
        await terminal.see("ready")
        assert terminal.is_raw
        go_on.set()
        assert (await terminal.rest()).endswith(message)
        assert await terminal.exit_code() == exit_code
        assert terminal.modes == before


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGHUP, -signal.SIGHUP),
        (signal.SIGQUIT, -signal.SIGQUIT),
        (signal.SIGINT, 130),
    ],
)
async def test_the_terminal_is_as_before_when_a_signal_ends_it(
    path: Path, number: int, exit_code: int
) -> None:
    hung_up = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin_on_terminal(peer)
        assert await peer.receive() is None
        hung_up.set()

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "sh") as terminal,
    ):
        before = terminal.modes
        await terminal.see("ready")
        terminal.process.send_signal(number)
        await hung_up.wait()
        assert await terminal.rest() == b""
        assert await terminal.exit_code() == exit_code
        assert terminal.modes == before


async def test_a_terminal_that_goes_away_takes_the_command_with_it(path: Path) -> None:
    hung_up = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin_on_terminal(peer)
        assert await peer.receive() is None
        hung_up.set()

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "sh") as terminal,
    ):
        await terminal.see("ready")
        terminal.hang_up()
        await hung_up.wait()
        assert await terminal.exit_code() == -signal.SIGHUP


async def test_a_command_that_never_starts_leaves_the_terminal_alone(path: Path) -> None:
    asked, go_on = trio.Event(), trio.Event()

    async def conversation(peer: Peer) -> None:
        await peer.receive()
        asked.set()
        await go_on.wait()
        await peer.send(responses.Error("sh: not found", "SPAWN_FAILED"))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-it", "sh") as terminal,
    ):
        before = terminal.modes
        await asked.wait()
        assert terminal.modes == before
        go_on.set()
        assert await terminal.rest() == b"innkeep: sh: not found\r\n"
        assert await terminal.exit_code() == 125
        assert terminal.modes == before


async def test_an_image_is_pulled_for_a_terminal_too_and_its_size_told_again(path: Path) -> None:
    run = requests.Run("alpine", (), interactive=True, tty=True)
    script: list[tuple[requests.AgentRequest, list[AgentResponse]]] = [
        (run, []),
        (Resize(*SIZE), [responses.Error("image not found: alpine", "NOT_FOUND")]),
        (requests.Pull("alpine"), [responses.Progress("Pulling layer 1/1", 50), responses.Ok()]),
        (run, []),
        (Resize(*SIZE), [responses.Started(), READY, responses.Exited(0)]),
    ]

    async def conversation(peer: Peer) -> None:
        for request, answers in script:
            assert await peer.receive() == request
            await peer.send(*answers)

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "run", "-it", "alpine") as terminal,
    ):
        assert b"Pulling layer 1/1" in await terminal.see("ready")
        assert await terminal.exit_code() == 0


@pytest.mark.parametrize("arguments", [["exec", "-i", "cat"], ["exec", "cat"], ["exec", "-t", "x"]])
async def test_without_both_i_and_t_an_interrupt_key_is_for_us(
    path: Path, arguments: list[str]
) -> None:
    hung_up = trio.Event()

    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(READY)
        while await peer.receive() is not None:
            pass
        hung_up.set()

    async with (
        serving(path, conversation) as address,
        on_terminal(address, *arguments) as terminal,
    ):
        before = terminal.modes
        await terminal.see("ready")
        assert terminal.modes == before
        await terminal.type("\x03")
        await hung_up.wait()
        assert await terminal.exit_code() == 130


async def test_without_t_the_terminal_gives_lines_and_its_end_key_ends_them(path: Path) -> None:
    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(READY)
        assert await some_input(peer, 6) == b"right\n"
        await peer.send(responses.Stdout(b"more"))
        assert await all_input(peer) == b""
        await peer.send(responses.Exited(0))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, "exec", "-i", "cat") as terminal,
    ):
        await terminal.see("ready")
        await terminal.type("wrong\x15right\r")
        await terminal.see("more")
        await terminal.type("\x04")
        assert await terminal.exit_code() == 0


@pytest.mark.parametrize("arguments", [["exec", "-i", "x"], ["exec", "-it", "x"], ["exec", "x"]])
async def test_a_terminal_where_nobody_types_does_not_hold_up_the_end(
    path: Path, arguments: list[str]
) -> None:
    async def conversation(peer: Peer) -> None:
        await begin(peer)
        await peer.send(responses.Exited(3))

    async with (
        serving(path, conversation) as address,
        on_terminal(address, *arguments) as terminal,
    ):
        assert await terminal.exit_code() == 3
