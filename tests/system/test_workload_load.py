"""Two hundred commands on one connection, with a reader that reads and with one that has stalled:
what arrives, and what the agent takes for it. `make soak` has them write 1 GiB."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from agent.workload_sessions.outbox import STREAM_BYTES
from protocol import workload
from protocol.client import WorkloadClient, open_workload_client
from tests.support.machine import Machine, booted
from tests.support.rounds import rounds
from tests.support.workload import LINE_BYTES, TOKEN, Counted, counting, open_peer

COMMANDS = rounds(20, 200)
OUTPUT_BYTES = rounds(96 << 20, 1 << 30)
STREAMS = [workload.Stdout, workload.Stderr]
# Of each stream: half of all is written for each of two readers.
LINES = OUTPUT_BYTES // 2 // (COMMANDS * len(STREAMS)) // LINE_BYTES
ALLOWANCE_BYTES = 20_000_000
# Writes to both streams at once, and says so when it has written all.
WRITER = ("/bin/sh", "-c", '"$@" >&2 & "$@"; wait; echo >/tmp/written', "sh", *counting(LINES))
WATCHER = (
    "mkfifo /tmp/written; exec 3<>/tmp/written; echo on; "
    f"n=0; while [ $n -lt {COMMANDS} ]; do read line <&3; n=$((n + 1)); done"
)


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


async def read_all(client: WorkloadClient) -> int:
    """Read until all commands are over; how many bytes did not come, which was told."""
    counted = {each: Counted() for each in product(range(1, COMMANDS + 1), STREAMS)}
    started: set[int] = set()
    over: set[int] = set()
    while len(over) < COMMANDS:
        match await client.receive():
            case workload.Started(number):
                assert number not in started
                started.add(number)
            case workload.Stdout(number, data, truncated) as message:
                assert number in started
                assert number not in over
                counted[number, type(message)].feed(data, truncated=truncated)
            case workload.Stderr(number, data, truncated) as message:
                assert number in started
                assert number not in over
                counted[number, type(message)].feed(data, truncated=truncated)
            case workload.Exit(number, code, reason):
                assert (code, reason) == (0, "exited")
                over.add(number)
            case message:
                assert isinstance(message, workload.Ready), message
    assert all(each.offset == LINES * LINE_BYTES for each in counted.values())
    return sum(each.missing_bytes for each in counted.values())


@pytest.mark.timeout(rounds(120, 1200))
async def test_every_byte_arrives_or_is_told_as_truncated_within_bounded_memory(
    vm: Machine,
) -> None:
    pid = vm.agent_pid()
    at_rest = vm.agents_memory_bytes()
    missing, resident = {}, {}
    for reader in ("reading", "stalled"):
        async with (
            open_peer(vm.address) as other,
            open_workload_client(vm.address, TOKEN) as client,
        ):
            await other.shell(1, WATCHER)
            await other.output(1, b"on")
            for number in range(1, COMMANDS + 1):
                await client.send(workload.Exec(number, WRITER, tty=False))
            if reader == "stalled":
                # They have written all they have, though nobody reads it; others are served.
                await other.until(lambda: other.told(1).is_over, within_s=rounds(60, 600))
                resident[reader] = vm.agents_memory_bytes()
            missing[reader] = await read_all(client)
            await other.until(lambda: other.told(1).is_over, within_s=rounds(60, 600))
            await other.shell(2, "rm /tmp/written")
            await other.over(2)
            resident[f"{reader}, then"] = vm.agents_memory_bytes()
    peak = peak_bytes(pid)
    written = COMMANDS * len(STREAMS) * LINES * LINE_BYTES
    print({"written": written, "missing": missing, "at rest": at_rest, "peak": peak, **resident})
    bound = COMMANDS * len(STREAMS) * STREAM_BYTES + ALLOWANCE_BYTES
    assert peak < bound + at_rest
    # With fewer commands the agent itself is more than is allowed beside them.
    assert peak < bound or COMMANDS < 200
    # What the stalled reader gets is the last of each, and what was on its way.
    assert missing["stalled"] > 0
    assert written - missing["stalled"] >= COMMANDS * len(STREAMS) * STREAM_BYTES * 9 // 10
    assert vm.agent_pid() == pid
