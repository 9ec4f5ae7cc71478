"""How the agent talks, whatever is asked: frames, order, strangers' messages, hang-ups."""

import time

import pytest
import trio

from protocol import MAX_FRAME_SIZE
from tests.support.execution import lifeline
from tests.support.machine import Machine
from tests.support.watch import until
from tests.support.wire import Wire, open_wire

PONG = {"status": "pong", "version": 1}


def is_pong(answer: object) -> bool:
    return isinstance(answer, dict) and answer.items() >= PONG.items()


async def test_a_ping_is_answered_by_the_protocols_version(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        assert is_pong(await wire.ask("ping"))


async def test_requests_sent_at_once_are_answered_in_their_order(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await wire.send({"method": "vm_exec", "command": ["sh", "-c", "sleep 0.2; echo first"]})
        await wire.send({"method": "ping"})
        await wire.send({"method": "vm_exec", "command": ["echo", "third"]})
        first, second, third = [await wire.receive() for _ in range(3)]
    assert {"status": "completed", "exit_code": 0, "stdout": "Zmlyc3QK", "stderr": ""}.items() <= (
        first.items()
    )
    assert is_pong(second)
    assert {"status": "completed", "exit_code": 0, "stdout": "dGhpcmQK", "stderr": ""}.items() <= (
        third.items()
    )


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"method": "dance"}, "dance"),
        ({"no_method": 1}, "method"),
        ({"method": "query"}, "image"),
        ({"method": "query", "image": 5}, "image"),
        ({"method": "vm_exec", "command": "ls"}, "command"),
        ({"method": "vm_exec", "command": ["ls"], "timeout_ms": -1}, "timeout_ms"),
        ({"method": "vm_exec", "command": ["ls"], "tty": 1}, "tty"),
    ],
    ids=str,
)
async def test_a_wrong_message_is_refused_by_name_and_the_connection_goes_on(
    machine: Machine, message: dict[str, object], named: str
) -> None:
    async with open_wire(machine.address) as wire:
        await wire.send(message)
        answer = await wire.receive()
        assert answer is not None
        assert answer["status"] == "error"
        assert answer["code"] == "INVALID_REQUEST"
        assert named in str(answer["message"])
        assert is_pong(await wire.ask("ping"))


@pytest.mark.parametrize("payload", [b"", b"\xff\xfe", b"[1]", b"{", b"null"], ids=repr)
async def test_what_is_no_json_object_is_refused_and_the_connection_goes_on(
    machine: Machine, payload: bytes
) -> None:
    async with open_wire(machine.address) as wire:
        await wire.stream.send_all(len(payload).to_bytes(4, "big") + payload)
        answer = await wire.receive()
        assert answer is not None
        assert answer["code"] == "INVALID_REQUEST"
        assert is_pong(await wire.ask("ping"))


async def test_stdin_and_resize_without_a_session_get_no_answer(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await wire.send({"method": "stdin", "data": "eA=="})
        await wire.send({"method": "resize", "cols": 100, "rows": 40})
        assert is_pong(await wire.ask("ping"))


async def test_a_frame_of_the_largest_size_is_read(machine: Machine) -> None:
    padding = b" " * (MAX_FRAME_SIZE - len(b'{"method":"ping"}'))
    async with open_wire(machine.address) as wire:
        frame = b'{"method":"ping"}' + padding
        await wire.stream.send_all(len(frame).to_bytes(4, "big") + frame)
        assert is_pong(await wire.receive())
        assert is_pong(await wire.ask("ping"))


async def test_a_larger_frame_is_answered_and_the_connection_closed(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await wire.stream.send_all((MAX_FRAME_SIZE + 1).to_bytes(4, "big") + b"{")
        answer = await wire.receive()
        assert answer is not None
        assert answer["code"] == "MESSAGE_TOO_LARGE"
        assert await wire.receive() is None


async def test_the_answer_to_a_larger_frame_arrives_while_it_is_still_sent(
    machine: Machine,
) -> None:
    size = MAX_FRAME_SIZE + 1
    async with open_wire(machine.address) as wire, trio.open_nursery() as nursery:

        async def send() -> None:
            try:
                await wire.stream.send_all(size.to_bytes(4, "big") + bytes(size))
            except trio.BrokenResourceError:
                return  # the agent need not hear it to its end

        nursery.start_soon(send)
        answer = await wire.receive()
        assert answer is not None
        assert answer["code"] == "MESSAGE_TOO_LARGE"
        nursery.cancel_scope.cancel()


async def test_half_a_close_ends_the_requests_and_not_the_answers(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await wire.send({"method": "vm_exec", "command": ["sh", "-c", "sleep 0.2; echo late"]})
        await wire.stream.send_eof()
        answer = await wire.receive()
        assert answer is not None
        assert answer["stdout"] == "bGF0ZQo="
        assert await wire.receive() is None


async def test_hanging_up_kills_the_whole_tree_of_the_running_command(machine: Machine) -> None:
    async with lifeline(machine.address) as line:
        async with open_wire(machine.address) as wire:
            await _exec(wire, line.script("setsid sh -c 'sleep 1000' & sleep 1000"))
            await line.started()
        with trio.fail_after(5):
            await line.ended()


async def test_a_hang_up_is_noticed_behind_requests_that_nobody_read_yet(
    machine: Machine,
) -> None:
    async with lifeline(machine.address) as line:
        async with open_wire(machine.address) as wire:
            await _exec(wire, line.script("sleep 1000"))
            await line.started()
            # No more than the kernel holds for a peer that does not read.
            for _ in range(40):
                await wire.send({"method": "query", "image": "x" * 2000})
        with trio.fail_after(5):
            await line.ended()


async def test_requests_behind_a_hang_up_are_not_carried_out(machine: Machine) -> None:
    async with lifeline(machine.address) as line:
        async with open_wire(machine.address) as wire:
            await _exec(wire, line.script("sleep 1000"))
            await line.started()
            await _exec(wire, "touch /tmp/should-not-be")
        await line.ended()
    async with open_wire(machine.address) as wire:
        answer = await wire.ask("vm_exec", command=["test", "-e", "/tmp/should-not-be"])
        assert answer["exit_code"] == 1


async def test_an_abrupt_reset_is_a_hang_up_too(machine: Machine) -> None:
    async with lifeline(machine.address) as line:
        async with open_wire(machine.address) as wire:
            await wire.send({"method": "ping"})
            await trio.lowlevel.wait_readable(wire.stream.socket)
            await _exec(wire, line.script("sleep 1000"))
            await line.started()
            # Closing over the unread pong makes it a reset for the peer, and not an end.
        with trio.fail_after(5):
            await line.ended()


async def test_one_slow_request_delays_no_other_connection(machine: Machine) -> None:
    async with open_wire(machine.address) as slow, open_wire(machine.address) as quick:
        await _exec(slow, "sleep 1; echo done")
        begun = time.monotonic()
        assert is_pong(await quick.ask("ping"))
        assert time.monotonic() - begun < 0.25


async def test_hundreds_of_idle_connections_cost_the_others_nothing(machine: Machine) -> None:
    count = 400
    idle: list[trio.SocketStream] = []
    try:
        for _ in range(count):
            stream = await trio.open_unix_socket(machine.address.removeprefix("unix:"))
            idle.append(stream)
        async with open_wire(machine.address) as wire:
            assert is_pong(await wire.ask("ping"))
            begun = time.monotonic()
            for _ in range(50):
                assert is_pong(await wire.ask("ping"))
            assert (time.monotonic() - begun) / 50 < 0.05
            assert machine.agents_open_files() >= count
    finally:
        for stream in idle:
            await stream.aclose()
    async with open_wire(machine.address) as wire:
        assert is_pong(await wire.ask("ping"))


async def test_connections_that_say_nothing_and_leave_are_forgotten(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        assert is_pong(await wire.ask("ping"))
        before = machine.agents_open_files()
        for _ in range(300):
            stream = await trio.open_unix_socket(machine.address.removeprefix("unix:"))
            await stream.aclose()
        # The agent accepts in order: once a later connection is served, it has had all those.
        async with open_wire(machine.address) as later:
            assert is_pong(await later.ask("ping"))
        assert is_pong(await wire.ask("ping"))
        assert machine.agents_open_files() < before + 50


async def test_no_command_inherits_a_clients_connection(machine: Machine) -> None:
    async with open_wire(machine.address), open_wire(machine.address) as wire:
        answer = await wire.ask("vm_exec", command=["ls", "/proc/self/fd"])
    # 0, 1 and 2, and the directory that ls itself reads.
    assert answer["stdout"] == "MAoxCjIKMwo="


async def test_the_trace_id_is_in_the_log_lines_of_its_request(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await wire.send({"trace_id": "trace-4711", "method": "query", "image": "absent"})
        assert (await wire.receive() or {})["code"] == "NOT_FOUND"

    def lines() -> list[str]:
        return [line for line in machine.console_text().splitlines() if "trace-4711" in line]

    # The console is on its way while the answer is here already.
    await until(lambda: bool(lines()), machine.console)
    assert all("query" in line for line in lines())


@pytest.mark.parametrize("trace_id", [5, None, {"a": 1}], ids=repr)
async def test_a_trace_id_that_is_no_string_is_ignored(machine: Machine, trace_id: object) -> None:
    async with open_wire(machine.address) as wire:
        await wire.send({"trace_id": trace_id, "method": "ping"})
        assert is_pong(await wire.receive())


async def _exec(wire: Wire, script: str) -> None:
    await wire.send({"method": "vm_exec", "command": ["/bin/sh", "-c", script]})
