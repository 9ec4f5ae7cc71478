"""Interactive commands in the machine itself: what they are told, and what they say meanwhile."""

import base64
import hashlib
import time
from contextlib import AsyncExitStack
from typing import Any

import attrs
import pytest
import trio

from protocol import MAX_FRAME_SIZE, encode, encode_frame, requests, responses
from protocol.client import AgentClient, open_client
from tests.protocol.sessions import pattern
from tests.support.execution import execute, lifeline, refusal, shell
from tests.support.lifelines import lifeline_in
from tests.support.machine import Machine
from tests.support.rounds import rounds
from tests.support.run_sessions import FILL, Session, answers_to, session, stdout_in
from tests.support.watch import until
from tests.support.wire import Wire, open_wire

MIB = 1024 * 1024
CHUNK_BYTES = 64 * 1024
STARTED = {"status": "started"}

# What lies between a command and a reader that takes nothing: the pipe, a chunk in the agent's
# hands, and the socket's buffers.
UNDERWAY_BYTES = 4 * MIB


def interactive(*command: str, **fields: Any) -> requests.VmExec:
    """The request for an interactive command; a single word is a shell script."""
    words = ("sh", "-c", *command) if len(command) == 1 else command
    return requests.VmExec(command=words, interactive=True, **fields)


async def the_end(talk: Session) -> tuple[int, bytes, bytes]:
    """Wait for the command's end: its status, and what came on its streams since."""
    exited = await talk.exited()
    return exited.exit_code, talk.stdout, talk.stderr


# What is answered, and when


async def test_a_session_is_started_then_output_then_exited(client: AgentClient) -> None:
    assert await answers_to(client, interactive("echo out; exit 3")) == [
        responses.Started(),
        responses.Stdout(b"out\n"),
        responses.Exited(3),
    ]


async def test_a_command_that_says_nothing_has_started_all_the_same(client: AgentClient) -> None:
    assert await answers_to(client, interactive(":")) == [
        responses.Started(),
        responses.Exited(0),
    ]


async def test_output_comes_while_the_command_runs(machine: Machine) -> None:
    script = "echo one; read go; echo two >&2; read go; echo three"
    async with session(machine.address, interactive(script)) as talk:
        await talk.see(b"one\n")
        await talk.send("\n")
        await talk.see_error(b"two\n")
        await talk.send("\n")
        assert await the_end(talk) == (0, b"three\n", b"")


async def test_both_streams_come_each_in_its_order(client: AgentClient) -> None:
    out, err = bytearray(), bytearray()
    script = "seq 1 100000 & seq 1 150000 >&2; wait"
    async with client.stream(interactive(script)) as answers:
        async for answer in answers:
            if isinstance(answer, responses.Stdout):
                out += answer.data
            elif isinstance(answer, responses.Stderr):
                err += answer.data
    assert out.decode().split() == [str(number) for number in range(1, 100001)]
    assert err.decode().split() == [str(number) for number in range(1, 150001)]


async def test_output_is_binary_and_in_chunks_of_at_most_64_kib(
    machine: Machine, client: AgentClient
) -> None:
    expected = machine.path("/usr/bin/python3.13").read_bytes()
    answers = await answers_to(client, interactive("cat", "/usr/bin/python3.13"))
    chunks = [answer.data for answer in answers if isinstance(answer, responses.Stdout)]
    assert b"".join(chunks) == expected
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)


async def test_the_status_is_the_exit_code_and_a_signal_is_named(client: AgentClient) -> None:
    *_, last = await answers_to(client, interactive("exit 255"))
    assert last == responses.Exited(255)
    *_, last = await answers_to(client, interactive("kill -KILL $$"))
    assert last == responses.Exited(137, signal=9)
    *_, last = await answers_to(client, interactive("sh -c 'kill -SEGV $$'; exit $?"))
    assert last == responses.Exited(139)


@pytest.mark.parametrize("fields", [{"interactive": True}, {"tty": True}], ids=str)
async def test_what_cannot_be_started_is_an_error_and_nothing_else(
    client: AgentClient, fields: dict[str, bool]
) -> None:
    request = requests.VmExec(command=("no-such-program",), **fields)
    (answer,) = await answers_to(client, request)
    assert isinstance(answer, responses.Error)
    assert answer.code == "SPAWN_FAILED"
    assert "not found" in answer.message
    request = requests.VmExec(command=("true",), workdir="/no/such", **fields)
    assert "/no/such" in (await refusal(client, request)).message
    assert (await execute(client, "true")).exit_code == 0


# Input


async def test_input_arrives_as_it_is_sent_and_empty_input_ends_it(machine: Machine) -> None:
    async with session(machine.address, interactive("cat", "-")) as talk:
        await talk.send(b"\x00\xff\r\n")
        await talk.see(b"\x00\xff\r\n")
        await talk.send("again")
        await talk.see(b"again")
        await talk.send("")
        assert await the_end(talk) == (0, b"", b"")


async def test_the_requests_input_comes_before_all_other(machine: Machine) -> None:
    request = interactive("cat", "-", stdin_data="first, ")
    async with session(machine.address, request) as talk:
        await talk.send("second")
        await talk.send("")
        assert await the_end(talk) == (0, b"first, second", b"")


async def test_what_comes_after_the_end_of_input_is_ignored(machine: Machine) -> None:
    async with session(machine.address, interactive("cat; read go </tmp/go")) as talk:
        await shell_of(machine, "mkfifo /tmp/go")
        for data in ("one", "", "two", "", "three"):
            await talk.send(data)
        await shell_of(machine, "echo >/tmp/go; rm /tmp/go")
        assert await the_end(talk) == (0, b"one", b"")


async def test_64_mib_pass_through_a_command_in_both_directions_at_once(
    client: AgentClient,
) -> None:
    data = pattern(64 * MIB)
    came, count = hashlib.sha256(), 0
    async with client.stream(interactive("cat", "-")) as answers, trio.open_nursery() as nursery:

        async def send() -> None:
            for at in range(0, len(data), MIB):
                await client.send(requests.Stdin(data[at : at + MIB]))
            await client.send(requests.Stdin(b""))

        nursery.start_soon(send)
        async for answer in answers:
            if isinstance(answer, responses.Stdout):
                came.update(answer.data)
                count += len(answer.data)
    assert answer == responses.Exited(0)
    assert count == len(data)
    assert came.digest() == hashlib.sha256(data).digest()


async def test_one_message_may_hold_as_much_input_as_a_frame_does(client: AgentClient) -> None:
    data = bytes(23 * MIB)
    async with client.stream(interactive("wc -c")) as answers:
        await client.send(requests.Stdin(data))
        await client.send(requests.Stdin(b""))
        said = [answer async for answer in answers]
    assert said[1:] == [responses.Stdout(f"{len(data)}\n".encode()), responses.Exited(0)]


@pytest.mark.parametrize(
    ("script", "output"),
    [
        ("echo done", b"done\n"),
        ("exec <&-; echo done", b"done\n"),
        ("head -c 3", b"xxx"),
        ("sleep 0.3; echo done", b"done\n"),
    ],
)
async def test_input_that_is_not_read_holds_nothing_up(
    client: AgentClient, script: str, output: bytes
) -> None:
    with trio.fail_after(20):
        async with client.stream(interactive(script)) as answers, trio.open_nursery() as nursery:

            async def send() -> None:
                for _ in range(8):
                    await client.send(requests.Stdin(b"x" * MIB))

            nursery.start_soon(send)
            said = [answer async for answer in answers]
        assert said == [responses.Started(), responses.Stdout(output), responses.Exited(0)]
        # What nobody read is not taken for the next request's.
        assert (await execute(client, "cat")).stdout == b""


async def test_half_a_close_ends_the_input_and_the_end_still_comes(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await send(wire, interactive("cat; sleep 0.2; echo late; exit 5"))
        assert await wire.receive() == STARTED
        await send(wire, requests.Stdin(b"early "))
        await wire.stream.send_eof()
        *output, last = await all_answers(wire)
    assert b"".join(stdout(answer) for answer in output) == b"early late\n"
    assert (last["status"], last["exit_code"]) == ("exited", 5)


# The conversation around a session


async def test_input_and_sizes_after_the_end_are_dropped(client: AgentClient) -> None:
    await answers_to(client, interactive("true", ""))
    for _ in range(3):
        await client.send(requests.Stdin(b"late"))
        await client.send(requests.Resize(100, 30))
    await client.send(requests.Stdin(b""))
    assert isinstance(await client.request(requests.Ping()), responses.Pong)
    assert await answers_to(client, interactive("cat", "/dev/null")) == [
        responses.Started(),
        responses.Exited(0),
    ]


@pytest.mark.parametrize("fields", [{}, {"background": True}], ids=str)
async def test_input_and_sizes_for_a_command_without_a_session_are_dropped(
    client: AgentClient, fields: dict[str, bool]
) -> None:
    request = requests.VmExec(("sh", "-c", "sleep 0.1; cat"), **fields)
    async with client.stream(request) as answers:
        await client.send(requests.Stdin(b"to nobody"))
        await client.send(requests.Resize(100, 30))
        await client.send(requests.Stdin(b""))
        (answer,) = [answer async for answer in answers]
    assert isinstance(answer, responses.Completed)
    assert b"nobody" not in answer.stdout
    assert isinstance(await client.request(requests.Ping()), responses.Pong)


async def test_requests_behind_a_session_are_answered_after_it(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await send(wire, interactive("cat"))
        for data in (b"one ", b"two", b""):
            await send(wire, requests.Stdin(data))
        await send(wire, requests.Ping())
        await send(wire, requests.Stdin(b"of no session"))
        await send(wire, requests.VmExec(command=("echo", "plain")))
        answers = [await wire.receive() or {} for _ in range(2)]
        while answers[-1]["status"] == "stdout":
            answers.append(await wire.receive() or {})
        assert b"".join(map(stdout, answers[1:-1])) == b"one two"
        assert [answers[0]["status"], answers[-1]["status"]] == ["started", "exited"]
        assert (await wire.receive() or {})["status"] == "pong"
        assert stdout(await wire.receive() or {}) == b"plain\n"


async def test_another_request_ends_the_input(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await send(wire, interactive("cat; echo ended"))
        await send(wire, requests.Ping())
        assert [answer["status"] for answer in [await wire.receive() or {} for _ in range(4)]] == [
            "started",
            "stdout",
            "exited",
            "pong",
        ]


async def test_a_message_that_cannot_be_read_is_refused_after_the_session(
    machine: Machine,
) -> None:
    async with open_wire(machine.address) as wire:
        await send(wire, interactive("cat"))
        await wire.send({"method": "stdin", "data": 5})
        assert [await wire.receive(), (await wire.receive() or {})["status"]] == [STARTED, "exited"]
        answer = await wire.receive() or {}
        assert (answer["status"], answer["code"]) == ("error", "INVALID_REQUEST")
        assert "data" in str(answer["message"])
        assert (await wire.ask("ping"))["status"] == "pong"


async def test_a_frame_above_the_limit_ends_the_command_and_is_answered(machine: Machine) -> None:
    async with lifeline(machine.address) as line:
        async with open_wire(machine.address) as wire:
            await send(wire, interactive(line.script("setsid sleep 1000 & cat")))
            assert await wire.receive() == STARTED
            await line.started()
            await wire.stream.send_all((MAX_FRAME_SIZE + 1).to_bytes(4, "big") + b"{")
            answer = await wire.receive() or {}
            assert answer["code"] == "MESSAGE_TOO_LARGE"
            assert await wire.receive() is None
        with trio.fail_after(5):
            await line.ended()


async def test_a_frame_above_the_limit_is_answered_behind_a_whole_chunk(
    machine: Machine,
) -> None:
    async with open_wire(machine.address) as wire:
        with lifeline_in(machine) as line:
            # More than the socket's buffers hold: the agent waits in the middle of a chunk.
            await send(wire, interactive(f"head -c 200000 /dev/zero; {line.script('yes')}"))
            await line.heard()
            await wire.stream.send_all((MAX_FRAME_SIZE + 1).to_bytes(4, "big") + b"{")
            *output, last = await all_answers(wire)
            assert {answer["status"] for answer in output} == {"started", "stdout"}
            assert last["code"] == "MESSAGE_TOO_LARGE"
            assert not line.is_held()


# Slow readers


async def test_a_reader_that_stalls_stalls_the_command_and_not_the_agents_memory(
    machine: Machine, client: AgentClient
) -> None:
    size = 64 * MIB
    progress = machine.path("/tmp") / "progress"
    progress.touch()
    script = (
        f"for i in $(seq 1 {size // CHUNK_BYTES}); do head -c 65536 /dev/zero; echo $i >$0; done"
    )

    def written_bytes() -> int:
        return int(progress.read_text() or 0) * CHUNK_BYTES

    memory = machine.agents_memory_bytes()
    async with client.stream(interactive("sh", "-c", script, "/tmp/progress")) as answers:
        assert await answers.__anext__() == responses.Started()
        await until(lambda: written_bytes() > 0, progress)
        # Meanwhile the same one runs to its end, whose reader takes what comes.
        async with open_client(machine.address) as other:
            said = await answers_to(other, interactive("sh", "-c", script, "/tmp/other"))
        assert len(stdout_in(said)) == size
        assert 0 < written_bytes() <= UNDERWAY_BYTES
        assert machine.agents_memory_bytes() < memory + size // 2
        said = [answer async for answer in answers]
    assert (len(stdout_in(said)), said[-1]) == (size, responses.Exited(0))
    progress.unlink()


async def test_a_time_limit_holds_while_the_reader_stalls(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        script = line.script("(setsid sh -c 'yes' &); yes")
        async with client.stream(interactive(script, timeout_ms=1000)) as answers:
            assert await answers.__anext__() == responses.Started()
            await line.started()
            begun = time.monotonic()
            with trio.fail_after(5):
                await line.ended()
            assert time.monotonic() - begun < 2.5
            *_, last = [answer async for answer in answers]
        assert isinstance(last, responses.Exited)
        assert (last.exit_code, last.timed_out, last.signal) == (124, True, None)
        assert last.duration_ms is not None
        assert 1000 <= last.duration_ms < 3000
        assert (await execute(client, "true")).exit_code == 0


async def test_all_that_was_written_before_the_end_comes_however_late(machine: Machine) -> None:
    async with (
        lifeline(machine.address) as line,
        open_client(machine.address) as client,
        client.stream(interactive(line.script(FILL))) as answers,
    ):
        with trio.fail_after(10):
            await line.ended()
        # Far beyond the patience with what a command leaves running.
        await shell_of(machine, "sleep 0.5")
        written = int(await shell_of(machine, "cat /tmp/written"))
        said = [answer async for answer in answers]
    assert written > CHUNK_BYTES
    assert len(stdout_in(said)) == written
    assert said[-1] == responses.Exited(0)


# Ends


async def test_a_time_limit_ends_the_whole_tree_with_124(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        script = line.script("echo so far; (setsid sleep 1000 &) ; sleep 1000")
        said = await answers_to(client, interactive(script, timeout_ms=500))
        assert said == [
            responses.Started(),
            responses.Stdout(b"so far\n"),
            responses.Exited(124, timed_out=True),
        ]
        with trio.fail_after(5):
            await line.ended()


async def test_a_time_limit_of_nothing_ends_at_once(client: AgentClient) -> None:
    with trio.fail_after(2):
        said = await answers_to(client, interactive("sleep 1000", timeout_ms=0))
    assert said == [responses.Started(), responses.Exited(124, timed_out=True)]


async def test_a_child_that_holds_the_streams_open_delays_nothing(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        script = line.script("sh -c 'sleep 1; echo late; echo late >&2' & echo done")
        begun = time.monotonic()
        said = await answers_to(client, interactive(script))
        assert time.monotonic() - begun < 0.6
        assert said == [
            responses.Started(),
            responses.Stdout(b"done\n"),
            responses.Exited(0),
        ]
        assert (await execute(client, "true")).exit_code == 0
        # It lives on: what it writes later is read by the agent and dropped, without SIGPIPE.
        with trio.fail_after(5):
            await line.ended()


async def test_a_child_that_writes_without_end_delays_nothing(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        begun = time.monotonic()
        async with client.stream(interactive(line.script("yes & echo $! >&2"))) as answers:
            pid = b""
            async for answer in answers:
                if isinstance(answer, responses.Stderr):
                    pid += answer.data
        assert answer == responses.Exited(0)
        assert time.monotonic() - begun < 2
        await shell(client, f"kill {pid.decode()}")
        with trio.fail_after(5):
            await line.ended()


async def test_a_child_that_is_left_behind_sees_the_end_of_its_input(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        script = line.script("cat <&3 >/dev/null & echo done")
        said = await answers_to(client, interactive(f"exec 3<&0; {script}"))
        assert said[-1] == responses.Exited(0)
        with trio.fail_after(5):
            await line.ended()


async def test_hanging_up_kills_the_whole_tree(machine: Machine) -> None:
    async with lifeline(machine.address) as line:
        script = line.script("(setsid sh -c 'trap \"\" TERM HUP INT; sleep 1000' &); cat")
        async with session(machine.address, interactive(script)) as talk:
            await line.started()
            await talk.send("to nobody")
        with trio.fail_after(5):
            await line.ended()


async def test_hanging_up_on_output_that_nobody_takes_kills_the_whole_tree(
    machine: Machine,
) -> None:
    async with lifeline(machine.address) as line:
        script = line.script("(setsid yes &); yes >&2")
        async with session(machine.address, interactive(script)):
            await line.started()
        with trio.fail_after(5):
            await line.ended()


# What a session is given


async def test_a_session_has_the_environment_and_the_signals_of_any_command(
    client: AgentClient,
) -> None:
    said = await answers_to(client, interactive("env", "-", "env"))
    assert said[1:] == [responses.Exited(0)]
    request = interactive("env", env=(("A", "1"), ("A", "2"), ("TERM", "dumb")))
    request = requests.VmExec(("env",), env=request.env, interactive=True)
    output = await output_of(client, request)
    environment = dict(line.split("=", 1) for line in output.decode().splitlines())
    assert environment.pop("PATH").split(":")
    assert environment == {"HOME": "/root", "TERM": "dumb", "A": "2"}
    # Without a shell between: busybox's ignores SIGQUIT, and so does what it turns into.
    grep = ("grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    status = await output_of(client, interactive(*grep))
    assert set(status.split()[1::2]) == {b"0" * 16}
    assert await output_of(client, interactive("pwd; yes | head -n 1")) == b"/\ny\n"


async def test_no_descriptor_of_the_agents_is_in_a_session(
    machine: Machine, client: AgentClient
) -> None:
    async with session(machine.address, interactive("cat", "-")):
        # 0, 1 and 2, and the directory that ls itself reads.
        assert await output_of(client, interactive("ls", "/proc/self/fd")) == b"0\n1\n2\n3\n"


async def test_a_command_that_has_closed_its_streams_costs_the_agent_nothing(
    machine: Machine,
) -> None:
    request = interactive("exec <&- >&- 2>&-; sleep 1")
    async with session(machine.address, request) as talk:
        await talk.send("nobody reads this")
        before = machine.agents_cpu_s()
        exited = await talk.exited()
        assert machine.agents_cpu_s() - before < 0.2
    assert exited == responses.Exited(0)


async def test_commands_that_wait_cost_the_agent_nothing(machine: Machine) -> None:
    async with AsyncExitStack() as stack:
        for number in range(20):
            request = requests.VmExec(("cat",), interactive=True, tty=number % 2 == 0)
            await stack.enter_async_context(session(machine.address, request))
        client = await stack.enter_async_context(open_client(machine.address))
        request = requests.VmExec(("sleep", "2"), background=True)
        for _ in range(10):
            await client.request(request)
        before = machine.agents_cpu_s()
        await execute(client, "sleep", "1")
        assert machine.agents_cpu_s() - before < 0.1


async def test_what_is_typed_and_shown_is_nobody_elses(machine: Machine) -> None:
    secret = "hunter2-do-not-tell"
    for fields in ({"interactive": True}, {"tty": True}):
        env = (("TOKEN", secret),)
        request = requests.VmExec(
            ("sh", "-c", "echo $TOKEN; cat"), env, stdin_data=secret, **fields
        )
        async with session(machine.address, request) as talk:
            await talk.send(f"{secret}\n")
            await talk.see(secret.encode())
            await talk.send("")
            await talk.exited()
        async with open_client(machine.address) as client:
            await refusal(client, attrs.evolve(request, command=("no-such",)))
            await client.send(requests.Stdin(secret.encode()))
            assert isinstance(await client.request(requests.Ping()), responses.Pong)
    said = machine.console_text()
    assert secret not in said
    assert secret.encode().hex() not in said
    assert base64.b64encode(secret.encode()).decode() not in said


async def test_nothing_of_many_sessions_stays_behind(machine: Machine) -> None:
    async with open_client(machine.address) as client:

        async def session_of(number: int) -> None:
            request = requests.VmExec(
                ("sh", "-c", "echo x; exit 1"), interactive=True, tty=number % 2 == 0
            )
            assert (await answers_to(client, request))[-1] == responses.Exited(1)

        for number in range(20):
            await session_of(number)
        files, memory = machine.agents_open_files(), machine.agents_memory_bytes()
        groups = await shell(client, "find /sys/fs/cgroup -type d | wc -l")
        for number in range(rounds(100, 10_000)):
            await session_of(number)
        assert machine.agents_open_files() <= files + 2
        assert machine.agents_memory_bytes() < memory + 8 * MIB
        assert await shell(client, "find /sys/fs/cgroup -type d | wc -l") == groups


async def output_of(client: AgentClient, request: requests.VmExec) -> bytes:
    """What a session that nobody types into has on stdout; it must succeed."""
    said = await answers_to(client, request)
    assert said[-1] == responses.Exited(0), said
    return stdout_in(said)


async def shell_of(machine: Machine, script: str) -> str:
    """As ``shell``, over a connection of its own."""
    async with open_client(machine.address) as client:
        return await shell(client, script)


async def send(wire: Wire, message: Any) -> None:
    await wire.stream.send_all(encode_frame(encode(message)))


async def all_answers(wire: Wire) -> list[dict[str, Any]]:
    """What the agent says until it hangs up."""
    answers = []
    while (answer := await wire.receive()) is not None:
        answers.append(answer)
    return answers


def stdout(answer: dict[str, Any]) -> bytes:
    """The output that is in an answer of the wire."""
    return base64.b64decode(answer.get("data", answer.get("stdout", "")))
