"""Two hundred commands on one connection, and a tenth as many on one whose reader has stalled: what
arrives, and what the agent takes for it. `make soak` has them write 1 GiB."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from protocol import Port, workload
from protocol.client import WorkloadClient, open_workload_client
from tests.support.machine import Machine, booted
from tests.support.rounds import rounds
from tests.support.workload import LINE_BYTES, TOKEN, Counted, counting, open_peer

COMMANDS = rounds(20, 200)
OUTPUT_BYTES = rounds(96 << 20, 1 << 30)
STALLED = COMMANDS // 10
LINES = OUTPUT_BYTES // (COMMANDS + STALLED) // LINE_BYTES


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    directory = tmp_path_factory.mktemp("machine")
    (directory / "token").write_text(TOKEN)
    with booted(directory, options=[f"--token-file={directory / 'token'}"]) as machine:
        yield machine


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kib) * 1024


async def read_all(client: WorkloadClient, commands: int, begun: trio.Event) -> tuple[int, int]:
    """Have all commands run, and read once `begun`; how many bytes came, and how many did not."""
    for number in range(1, commands + 1):
        await client.send(workload.Exec(number, counting(LINES), tty=False))
    await begun.wait()
    counted = {number: Counted() for number in range(1, commands + 1)}
    started: set[int] = set()
    over: set[int] = set()
    while len(over) < commands:
        match await client.receive():
            case workload.Started(number):
                assert number not in started
                started.add(number)
            case workload.Stdout(number, data, truncated):
                assert number in started
                assert number not in over
                counted[number].feed(data, truncated=truncated)
            case workload.Exit(number, code, reason):
                assert (code, reason) == (0, "exited")
                over.add(number)
            case message:
                assert isinstance(message, workload.Ready), message
    assert all(each.offset == LINES * LINE_BYTES for each in counted.values())
    missing = sum(each.missing_bytes for each in counted.values())
    return commands * LINES * LINE_BYTES - missing, missing


async def test_every_byte_arrives_or_is_told_as_truncated_within_bounded_memory(
    vm: Machine,
) -> None:
    pid = vm.agent_pid()
    at_rest = peak_bytes(pid)
    results: dict[str, tuple[int, int]] = {}
    at_once, later = trio.Event(), trio.Event()
    at_once.set()

    async def have(name: str, commands: int, begun: trio.Event) -> None:
        async with open_workload_client(vm.address, TOKEN, Port.WORKLOAD_CONTROL) as client:
            results[name] = await read_all(client, commands, begun)

    with trio.fail_after(rounds(60, 600)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(have, "stalled", STALLED, later)
            await have("reading", COMMANDS, at_once)
            # By now those of the other have written all they have, though nobody reads it.
            async with open_peer(vm.address) as peer:
                await peer.shell(1, "while pidof awk >/dev/null; do sleep 0.05; done")
                assert (await peer.over(1)).exit == (0, "exited")
            later.set()
    peak = peak_bytes(pid)
    print({"results": results, "at rest": at_rest >> 20, "peak": peak >> 20})
    assert peak < 2 * COMMANDS * (1 << 20) + (20 << 20) + at_rest
    received, missing = results["stalled"]
    if LINES * LINE_BYTES > 2 << 20:
        assert missing
    # What it gets is the last megabyte of each, and what was on its way.
    assert received >= STALLED * min(LINES * LINE_BYTES, 900 << 10)
    assert vm.agent_pid() == pid
