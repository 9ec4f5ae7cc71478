"""What a workload can do to a VM, and what the agent and other commands notice of it: nothing.

All the while a second connection pings. Its pongs come within 250 ms, though the VM is emulated, on
one thread: the agent's cgroup goes before all others (cpu.weight), and is short of neither memory
nor processes.
"""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import execute, lifeline, shell
from tests.support.machine import Machine, booted
from tests.support.wire import open_wire

pytestmark = pytest.mark.timeout(180)

WORST_PONG_S = 0.25
BETWEEN_PINGS_S = 0.02
PATIENCE_S = 60
MIB = 1 << 20
WORKLOAD_MIB = 200
WORKLOADS = "/sys/fs/cgroup/workloads"

FORK_BOMB = ":(){ :|:& };:"
MEMORY_EATERS = {
    "python": "exec python3 -I -S -c 'held = []\nwhile True: held.append(b\"x\" * 1048576)'",
    "tail": "tail /dev/zero",
}
# Each goes on until it is ended, and what it has started as well.
ABUSES = {
    "ignores TERM": "trap '' TERM; while :; do :; done",
    "daemon": "(setsid sh -c 'trap \"\" TERM; sleep 1000' >/dev/null 2>&1 &); sleep 1000",
    "closed outputs": "exec >&- 2>&-; sleep 1000",
    "busy": "for _ in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; wait",
    "fork bomb": f"{FORK_BOMB}; sleep 1000",
}
# Some 15 MB each, so that it runs out of memory long before it runs out of processes.
MEMORY_BOMB = """\
import os
while True:
    try:
        os.fork()
        held = b"x" * 10000000
    except OSError:
        pass
"""
# Returns when a number in a file grows that tells of its changes, as cgroup2's do.
GROWS = """\
import select, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    def number():
        file.seek(0)
        return dict(line.split() for line in file.read().decode().splitlines())[sys.argv[2]]
    change = select.epoll()
    change.register(file, select.EPOLLPRI)
    before = number()
    while number() == before:
        change.poll()
"""
# Fills a pipe that nobody reads, says so when it has been full for a second, and goes on.
FILL_PIPE = """\
import os, select, sys
os.set_blocking(1, False)
while select.select([], [1], [], 1)[1]:
    os.write(1, b"x" * 65536)
with open(sys.argv[1], "w") as full:
    full.write("full")
os.set_blocking(1, True)
while True:
    os.write(1, b"x" * 65536)
"""


@pytest.fixture(scope="module")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A VM that nobody else has to live in."""
    words = [f"--append=innkeep.workload_memory={WORKLOAD_MIB}M", "--memory=512M"]
    directory = tmp_path_factory.mktemp("abused")
    with booted(directory, kind="auto", in_memory=True, options=words) as machine:
        yield machine


@pytest.fixture
async def abuser(abused: Machine) -> AsyncIterator[AgentClient]:
    async with open_client(abused.address) as client:
        yield client


@asynccontextmanager
async def answering(machine: Machine) -> AsyncIterator[None]:
    """Hold the agent to its pongs for the block, and to being the same process afterwards."""
    pongs_s: list[float] = []

    async def ping(client: AgentClient) -> None:
        while True:
            begun = time.perf_counter()
            with trio.fail_after(PATIENCE_S):
                assert isinstance(await client.request(requests.Ping()), responses.Pong)
            pongs_s.append(time.perf_counter() - begun)
            # As hosts do it; back to back, the pings would be most of what the VM does.
            await trio.sleep(BETWEEN_PINGS_S)

    async with open_client(machine.address) as client, open_client(machine.address) as other:
        agent = await shell(other, "cat /sys/fs/cgroup/agent/cgroup.procs")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping, client)
            yield
            nursery.cancel_scope.cancel()
        assert await shell(other, "cat /sys/fs/cgroup/agent/cgroup.procs") == agent
    slow = [f"{pong * 1000:.0f} ms" for pong in pongs_s if pong > WORST_PONG_S]
    assert slow == [], f"{len(slow)} of {len(pongs_s)} pongs"
    assert pongs_s


async def test_the_agent_is_kept_out_of_the_limits_that_workloads_have(
    abuser: AgentClient,
) -> None:
    async def number(file: str) -> int:
        return int(await shell(abuser, f"cat {file}"))

    own = f"{WORKLOADS}/commands/$(sed 's:.*/::' /proc/self/cgroup)"
    threads_max = await number("/proc/sys/kernel/threads-max")
    assert await number(f"{WORKLOADS}/memory.max") == WORKLOAD_MIB * MIB
    assert await number(f"{WORKLOADS}/pids.max") == threads_max // 4
    assert await number(f"{own}/memory.max") == WORKLOAD_MIB * MIB * 15 // 16
    assert await number(f"{own}/pids.max") == threads_max // 4 // 2
    assert await number("/sys/fs/cgroup/agent/memory.min") == 64 * MIB
    assert await number("/sys/fs/cgroup/agent/cpu.weight") == 1000
    for parent in ("commands", "containers", "privileged"):
        there = await shell(abuser, f"cat {WORKLOADS}/{parent}/cgroup.subtree_control")
        assert {"cpu", "memory", "pids"} <= set(there.split())


async def test_the_agent_is_never_killed_for_memory_and_its_children_are(
    abuser: AgentClient,
) -> None:
    agents = "/proc/$(cat /sys/fs/cgroup/agent/cgroup.procs)/oom_score_adj"
    assert await shell(abuser, f"cat /proc/$$/oom_score_adj {agents}") == "0\n-1000\n"


@pytest.mark.parametrize("abuse", ABUSES)
async def test_its_time_limit_ends_it_and_all_that_it_started(
    abused: Machine, abuser: AgentClient, abuse: str
) -> None:
    async with answering(abused), lifeline(abused.address) as line:
        with trio.fail_after(PATIENCE_S):
            script = line.script(ABUSES[abuse])
            done = await execute(abuser, "sh", "-c", script, timeout_ms=3000)
            assert (done.exit_code, done.timed_out) == (124, True)
            await line.ended()


@pytest.mark.parametrize("abuse", ABUSES)
async def test_a_hang_up_ends_it_and_all_that_it_started(abused: Machine, abuse: str) -> None:
    async with answering(abused), lifeline(abused.address) as line:
        async with open_client(abused.address) as client:
            command = ("sh", "-c", line.script(ABUSES[abuse]))
            await client.send(requests.VmExec(command=command))
            await line.started()
        with trio.fail_after(PATIENCE_S):
            await line.ended()


@pytest.mark.parametrize(
    ("bomb", "file", "number"),
    [
        (("sh", "/tmp/fork-bomb"), "pids.events", "max"),
        (("python3", "-I", "-S", "-c", MEMORY_BOMB), "memory.events", "oom_kill"),
    ],
    ids=["forks", "eats"],
)
async def test_a_command_starts_while_another_one_takes_all_that_it_can_get(
    abused: Machine, abuser: AgentClient, bomb: tuple[str, ...], file: str, number: str
) -> None:
    # From a file, as a shell script that someone runs.
    await shell(abuser, f"echo '{FORK_BOMB}; sleep 1000' >/tmp/fork-bomb")
    async with answering(abused), lifeline(abused.address) as line:
        async with open_client(abused.address) as client:
            # The first of its processes may be the one that is killed for memory.
            script = line.script('"$@"; sleep 1000')
            await client.send(requests.VmExec(command=("sh", "-c", script, "sh", *bomb)))
            with trio.fail_after(PATIENCE_S):
                reached = await execute(
                    abuser, "python3", "-I", "-S", "-c", GROWS, f"{WORKLOADS}/{file}", number
                )
            assert reached.exit_code == 0, reached
            with trio.fail_after(3):
                assert await shell(abuser, "echo alive") == "alive\n"
        with trio.fail_after(PATIENCE_S):
            await line.ended()


@pytest.mark.parametrize("eater", MEMORY_EATERS)
async def test_what_eats_all_memory_is_killed_for_it_and_nothing_else(
    abused: Machine, abuser: AgentClient, eater: str
) -> None:
    await shell(abuser, "mkfifo /tmp/over")
    async with (
        answering(abused),
        lifeline(abused.address) as line,
        open_client(abused.address) as client,
    ):
        bystander = requests.VmExec(command=("sh", "-c", line.script("cat /tmp/over; echo alive")))
        async with client.stream(bystander) as answers:
            await line.started()
            with trio.fail_after(PATIENCE_S):
                done = await execute(abuser, "sh", "-c", MEMORY_EATERS[eater])
            assert (done.exit_code, done.oom) == (137, True)
            await shell(abuser, "echo over >/tmp/over; rm /tmp/over")
            (answer,) = [answer async for answer in answers]
    assert isinstance(answer, responses.Completed)
    assert (answer.exit_code, answer.stdout) == (0, b"over\nalive\n")
    assert not answer.oom


async def test_a_pipe_that_the_host_does_not_read_holds_up_nobody_else(
    abused: Machine, abuser: AgentClient
) -> None:
    await shell(abuser, "mkfifo /tmp/full")
    async with (
        answering(abused),
        lifeline(abused.address) as line,
        open_wire(abused.address) as wire,
    ):
        script = line.script('exec python3 -I -S -c "$1" /tmp/full')
        command = ["sh", "-c", script, "sh", FILL_PIPE]
        await wire.send({"method": "vm_exec", "command": command, "interactive": True})
        with trio.fail_after(PATIENCE_S):
            assert await shell(abuser, "cat /tmp/full; rm /tmp/full") == "full"
            assert await shell(abuser, "echo alive") == "alive\n"
            # Not a close: vhost-device-vsock forgets to tell the VM of one that drops unread bytes.
            await wire.stream.send_eof()
            await line.ended()
