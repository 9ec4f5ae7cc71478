"""The control port, sentence by sentence: requests, ids, output, ends."""

import signal
from contextlib import AsyncExitStack

import pytest

from agent.processes.cgroup import Cgroup
from protocol import encode_frame, workload
from tests.support.workload import Peer, Served, open_peer, outlived


async def test_after_auth_ok_comes_ready_once_commands_can_run(ports: Served) -> None:
    async with open_peer(ports.address, ready=False) as peer:
        assert await peer.receive() == workload.Ready()


async def test_exec_answers_started_then_output_then_exit_with_its_request_id(peer: Peer) -> None:
    await peer.shell(7, "echo out; echo err >&2; exit 3")
    told = await peer.over(7)
    assert (told.stdout, told.stderr) == (b"out\n", b"err\n")
    assert told.exit == (3, "exited")
    assert peer.order == [
        workload.Ready(),
        workload.Started(7),
        workload.Exit(7, 3, "exited"),
    ]
    assert set(peer.of) == {7}


async def test_run_starts_the_workload_with_its_environment_and_directory(peer: Peer) -> None:
    await peer.run(1, "/bin/sh", "-c", 'echo "$A $PWD"', env=(("A", "b"),), workdir="/tmp")
    told = await peer.over(1)
    assert told.stdout == b"b /tmp\n"
    assert told.started
    assert told.exit == (0, "exited")


async def test_run_output_is_of_both_streams_with_its_request_id(peer: Peer) -> None:
    await peer.run(1, "/bin/sh", "-c", "echo out; echo err >&2; exit 5")
    told = await peer.over(1)
    assert (told.stdout, told.stderr, told.exit) == (b"out\n", b"err\n", (5, "exited"))


async def test_there_is_one_workload_at_a_time_and_a_second_is_an_error_with_its_id(
    ports: Served, peer: Peer
) -> None:
    await peer.run(1, "sleep", "1000")
    await peer.run(2, "true")
    assert (await peer.over(2)).error == "the workload runs already: there is one at a time"
    async with open_peer(ports.address) as other:
        await other.run(9, "true")
        assert "one at a time" in str((await other.over(9)).error)
    await peer.signal(1, signal.SIGKILL)
    assert (await peer.over(1)).exit == (137, "signaled: SIGKILL")
    await peer.run(3, "true")
    assert (await peer.over(3)).exit == (0, "exited")


async def test_many_commands_at_once_on_one_connection(peer: Peer) -> None:
    for number in range(1, 41):
        await peer.shell(number, f"trap 'exit {number}' USR1; echo {number}; sleep 1000 & wait")
    for number in range(1, 41):
        await peer.output(number, b"\n")
    for number in range(40, 0, -1):
        await peer.signal(number, signal.SIGUSR1)
        told = await peer.over(number)
        assert told.stdout == b"%d\n" % number
        assert told.exit == (number, "exited")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGRTMIN + 3])
async def test_a_signal_ends_a_command_with_128_and_its_number_and_its_name(
    peer: Peer, number: int
) -> None:
    await peer.exec(1, "sleep", "1000")
    await peer.run(2, "sleep", "1000")
    await peer.signal(1, number)
    await peer.signal(2, number)
    name = "SIGRTMIN+3" if number == signal.SIGRTMIN + 3 else signal.Signals(number).name
    for request_id in (1, 2):
        assert (await peer.over(request_id)).exit == (128 + number, f"signaled: {name}")


async def test_a_signal_goes_to_the_process_group_of_its_request(peer: Peer) -> None:
    script = "sh -c 'trap \"echo child\" USR1; echo a; while :; do sleep 1; done' & "
    script += "trap 'echo parent; exit 4' USR1; echo b; wait"
    await peer.shell(1, script)
    await peer.until(lambda: {*b"ab"} <= {*peer.told(1).stdout})
    await peer.shell(2, "echo other; exec sleep 1000")
    await peer.output(2, b"other")
    await peer.signal(1, signal.SIGUSR1)
    told = await peer.over(1)
    assert told.exit == (4, "exited")
    assert b"parent" in told.stdout
    assert not peer.told(2).is_over


async def test_a_signal_that_comes_before_its_command_has_started_reaches_it(peer: Peer) -> None:
    for request_id in range(1, 20):
        await peer.exec(request_id, "sleep", "1000")
        await peer.signal(request_id, signal.SIGKILL)
    for request_id in range(1, 20):
        assert (await peer.over(request_id)).exit == (137, "signaled: SIGKILL")
    await peer.run(20, "sleep", "1000")
    await peer.signal(20, signal.SIGINT)
    assert (await peer.over(20)).exit == (130, "signaled: SIGINT")


async def test_unknown_ids_are_an_error_that_names_them(peer: Peer) -> None:
    await peer.signal(77, signal.SIGTERM)
    assert "77" in str((await peer.over(77)).error)
    await peer.exec(5, "true")
    await peer.over(5)
    await peer.signal(5, signal.SIGTERM)
    await peer.until(lambda: peer.told(5).error is not None)
    assert "5" in str(peer.told(5).error)


@pytest.mark.parametrize("number", [0, -1, 65, 2**31 - 1])
async def test_a_number_that_is_no_signals_is_an_error(peer: Peer, number: int) -> None:
    await peer.exec(1, "sleep", "1000")
    await peer.signal(1, number)
    await peer.until(lambda: peer.told(1).error is not None)
    assert "1 to 64" in str(peer.told(1).error)


async def test_ids_belong_to_a_connection(ports: Served, peer: Peer) -> None:
    async with open_peer(ports.address) as other:
        await peer.exec(1, "sleep", "1000")
        await peer.until(lambda: peer.told(1).started)
        await other.signal(1, signal.SIGKILL)
        assert "no command has the request_id 1" in str((await other.over(1)).error)
        await other.shell(2, "echo mine")
        assert (await other.over(2)).stdout == b"mine\n"
    assert not peer.told(1).is_over


async def test_an_id_that_is_in_use_is_an_error_and_the_command_goes_on(peer: Peer) -> None:
    await peer.shell(1, "trap 'echo done; exit' USR1; sleep 1000 & echo on; wait")
    await peer.output(1, b"on")
    await peer.exec(1, "true")
    await peer.until(lambda: peer.told(1).error is not None)
    await peer.signal(1, signal.SIGUSR1)
    await peer.until(lambda: peer.told(1).exit is not None)
    assert peer.of.pop(1).stdout == b"on\ndone\n"
    await peer.shell(1, "exit 9")
    await peer.until(lambda: peer.told(1).exit == (9, "exited"))


async def test_stdin_is_dev_null(peer: Peer) -> None:
    await peer.shell(1, "readlink /proc/self/fd/0")
    await peer.run(2, "readlink", "/proc/self/fd/0")
    assert (await peer.over(1)).stdout == b"/dev/null\n"
    assert (await peer.over(2)).stdout == b"/dev/null\n"


async def test_a_tty_is_80x24_and_all_its_output_is_stdout(peer: Peer) -> None:
    await peer.shell(1, "stty size; test -t 0 && echo terminal >&2", tty=True)
    told = await peer.over(1)
    assert told.stdout == b"24 80\r\nterminal\r\n"
    assert told.exit == (0, "exited")


@pytest.mark.parametrize(
    ("command", "cause"),
    [(("no-such-program",), "not found"), (("/etc/passwd",), "not executable")],
)
async def test_a_command_that_cannot_be_started_is_an_exit_with_the_cause(
    peer: Peer, command: tuple[str, ...], cause: str
) -> None:
    await peer.exec(1, *command)
    await peer.run(2, *command)
    for request_id in (1, 2):
        told = await peer.over(request_id)
        assert told.exit is not None
        assert told.exit[1].startswith("failed to start: ")
        assert cause in told.exit[1]
        assert not told.started
    await peer.run(3, "true")
    assert (await peer.over(3)).exit == (0, "exited")


async def test_no_command_at_all_is_an_error(peer: Peer) -> None:
    await peer.exec(1)
    await peer.run(2)
    await peer.exec(3, "a\0b")
    for request_id in (1, 2, 3):
        told = await peer.over(request_id)
        assert str(told.error).startswith("command: ")


async def test_a_message_that_cannot_be_read_is_an_error_and_the_connection_goes_on(
    ports: Served, peer: Peer
) -> None:
    stream = peer.client._frames.stream
    await stream.send_all(encode_frame(b"{"))
    await stream.send_all(encode_frame(b'{"type":"exec","request_id":4,"command":"x","tty":false}'))
    await stream.send_all(encode_frame(b'{"type":"resize","request_id":"x"}'))
    await peer.until(lambda: peer.told(4).error is not None and len(peer.order) == 4)
    assert "exec.command" in str(peer.told(4).error)
    assert "resize" in str(peer.told(None).error)
    await peer.exec(1, "true")
    assert (await peer.over(1)).exit == (0, "exited")


async def test_a_frame_above_the_limit_is_an_error_and_the_end_of_the_connection(
    peer: Peer,
) -> None:
    await peer.client._frames.stream.send_all((33 << 20).to_bytes(4, "big"))
    await peer.until(lambda: peer.told(None).error is not None)
    assert "frame too large" in str(peer.told(None).error)
    assert await peer.closed()


async def test_a_second_auth_is_auth_failed_and_the_end_of_the_connection(
    ports: Served, peer: Peer
) -> None:
    await peer.exec(1, "sleep", "1000")
    await peer.until(lambda: peer.told(1).started)
    await peer.send(workload.Auth("x", 1))
    await peer.until(lambda: workload.AuthFailed() in peer.order)
    assert await peer.closed()
    assert peer.order[-1] == workload.AuthFailed()


async def test_after_a_half_close_all_that_was_asked_for_is_still_told(peer: Peer) -> None:
    await peer.shell(1, "sleep 0.2; echo late")
    await peer.client._frames.stream.send_eof()  # type: ignore[attr-defined]
    told = await peer.over(1)
    assert told.stdout == b"late\n"
    assert await peer.closed()


async def test_a_hang_up_kills_the_connections_execs_with_all_they_started_never_the_workload(
    ports: Served,
) -> None:
    tree = ports.services.processes.tree
    assert tree is not None
    async with AsyncExitStack() as ends, open_peer(ports.address) as peer:
        await peer.run(1, "/bin/sh", "-c", "echo on; exec sleep 1000")
        await peer.output(1, b"on")
        (kept,) = Cgroup.all_in(tree.commands)
        await peer.shell(2, "setsid sleep 1000 & echo started; wait")
        await peer.output(2, b"started")
        (other,) = (cgroup for cgroup in Cgroup.all_in(tree.commands) if cgroup != kept)
        await ends.enter_async_context(outlived(other))
    assert kept.is_populated()
    async with open_peer(ports.address) as later, outlived(kept):
        await later.run(1, "true")
        assert "runs already" in str((await later.over(1)).error)
        await later.stop(0)
