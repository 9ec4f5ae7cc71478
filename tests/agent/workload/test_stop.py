"""Ends that a host or the agent brings about: stop, and what the workload is after it."""

import signal

import trio

from protocol import workload
from tests.support.workload import Peer, Served, open_peer

OBSTINATE = "trap '' TERM; echo on; while :; do sleep 1000; done"


async def test_stop_sends_term_to_all_and_exit_for_each_with_the_reason_stopped(
    ports: Served, peer: Peer
) -> None:
    polite = "trap 'echo bye; exit 3' TERM; sleep 1000 & echo on; wait"
    await peer.run(1, "/bin/sh", "-c", polite)
    await peer.shell(2, polite)
    await peer.exec(3, "sleep", "1000")
    async with open_peer(ports.address) as other:
        await other.shell(1, polite)
        await other.output(1, b"on")
        for request_id in (1, 2):
            await peer.output(request_id, b"on")
        await peer.until(lambda: peer.told(3).started)
        await other.stop(60_000)
        assert (await other.over(1)).exit == (3, "stopped")
    for request_id in (1, 2):
        told = await peer.over(request_id)
        assert told.exit == (3, "stopped")
        assert told.stdout == b"on\nbye\n"
    assert (await peer.over(3)).exit == (143, "stopped")


async def test_stop_kills_after_its_time_what_does_not_end(peer: Peer) -> None:
    await peer.run(1, "/bin/sh", "-c", OBSTINATE)
    await peer.shell(2, OBSTINATE)
    for request_id in (1, 2):
        await peer.output(request_id, b"on")
    begun = trio.current_time()
    await peer.stop(300)
    for request_id in (1, 2):
        assert (await peer.over(request_id)).exit == (137, "stopped")
    assert trio.current_time() - begun >= 0.3


async def test_a_later_stop_may_leave_less_time(peer: Peer) -> None:
    await peer.shell(1, OBSTINATE)
    await peer.output(1, b"on")
    await peer.stop(1_000_000)
    await peer.exec(2, "true")
    await peer.run(3, "true")
    for request_id in (2, 3):
        assert (await peer.over(request_id)).error == "everything is being stopped"
    await peer.stop(0)
    assert (await peer.over(1)).exit == (137, "stopped")


async def test_after_a_stop_commands_run_again(peer: Peer) -> None:
    await peer.run(1, "sleep", "1000")
    await peer.until(lambda: peer.told(1).started)
    await peer.stop(5_000)
    await peer.over(1)
    # It is over when the last of them is told; asking too early is an error and no more.
    request_id = 2
    while True:
        await peer.run(request_id, "true")
        told = await peer.over(request_id)
        if told.error is None:
            break
        request_id += 1
    assert told.exit == (0, "exited")


async def test_stop_with_nothing_to_stop_says_nothing(peer: Peer) -> None:
    await peer.stop(0)
    await peer.exec(1, "true")
    await peer.over(1)
    assert workload.Ready() in peer.order
    assert set(peer.of) == {1}


async def test_stop_reaches_what_has_changed_its_session(ports: Served, peer: Peer) -> None:
    # The last of it says so when it is there: what is forked later, or still has the handlers of
    # the shell that forked it, has to be killed.
    last = "sh -c 'echo on; exec sleep 1000'"
    await peer.run(
        1, "/bin/sh", "-c", 'setsid sh -c "$0" & wait', f'trap "exit" TERM; {last} & wait'
    )
    await peer.output(1, b"on")
    await peer.stop(10_000)
    await peer.over(1)
    tree = ports.services.processes.tree
    assert tree is not None
    with trio.fail_after(10):
        await ports.services.processes.seen_off(tree.commands)


async def test_a_signal_by_another_connection_reaches_the_workload_as_0(
    ports: Served, peer: Peer
) -> None:
    await peer.run(5, "sleep", "1000")
    await peer.until(lambda: peer.told(5).started)
    async with open_peer(ports.address) as other:
        await other.signal(0, signal.SIGTERM)
        assert (await peer.over(5)).exit == (143, "signaled: SIGTERM")
        await other.signal(0, signal.SIGTERM)
        assert "0" in str((await other.over(0)).error)
