"""What a machine uses, by its containers and commands; with controllers: tests/vm."""

from collections.abc import Callable

import trio

from protocol import decode_value, requests, responses
from protocol.client import AgentClient
from protocol.machine import CommandUse, VmStats
from tests.support.execution import execute, lifeline, shell
from tests.support.machine import Machine
from tests.support.standing import Persistent

BUSY = "while :; do :; done"


async def stats(client: AgentClient) -> VmStats:
    answer = await client.ask(requests.VmStats(), responses.Ok)
    return decode_value(answer.data, VmStats)


async def command_of(client: AgentClient, pid: int) -> CommandUse | None:
    told = await stats(client)
    return next((each for each in told.commands if each.pid == pid), None)


async def grown(client: AgentClient, count: Callable[[VmStats], int | None]) -> bool:
    """Whether a count grows, as long as it may take a busy machine."""
    before = count(await stats(client))
    assert before is not None
    with trio.fail_after(20):
        while True:
            # A command's time, for something to be counted.
            await execute(client, "true")
            after = count(await stats(client))
            assert after is not None
            if after > before:
                return True


async def test_a_command_in_the_background_is_known_by_its_pid_until_it_ends(
    machine: Machine, client: AgentClient
) -> None:
    async with lifeline(machine.address) as line:
        done = await execute(client, "sh", "-c", line.script(BUSY), background=True)
        pid = int(done.stdout)
        told = await command_of(client, pid)
        assert told is not None
        assert (told.pid, told.container, told.program) == (pid, None, "sh")

        def cpu_us(told: VmStats) -> int | None:
            return next(each.cpu_us for each in told.commands if each.pid == pid)

        assert await grown(client, cpu_us)
        # Without a controller, as it is outside a VM.
        assert (told.memory_bytes, told.pids, told.read_bytes, told.oom_kills) == (None,) * 4
        await shell(client, f"kill -9 {pid}")
        await line.ended()
    with trio.fail_after(20):
        while await command_of(client, pid) is not None:
            await execute(client, "true")


async def test_a_container_that_stays_is_told_with_the_commands_in_it(
    persistent: Persistent, client: AgentClient
) -> None:
    async with persistent.lifeline() as first, persistent.lifeline() as second:
        container_id = await persistent.detach(first.script("sleep 1000; :"))
        pid = await persistent.background(second.script("sleep 1000; :"))
        # Before that they are crun.
        await first.started()
        await second.started()
        told = await stats(client)
        await persistent.end()
    (container,) = (each for each in told.containers if each.id == container_id)
    assert (container.overlay, container.program) == (persistent.id, "sh")
    assert container.pid != pid
    (command,) = (each for each in told.commands if each.pid == pid)
    assert (command.container, command.program) == (container_id, "sh")
    assert command.cpu_us is not None
    assert container.cpu_us is not None
    assert command.cpu_us <= container.cpu_us


async def test_a_container_of_one_command_is_there_while_that_runs(
    persistent: Persistent, machine: Machine, client: AgentClient
) -> None:
    async with lifeline(machine.address, "/storage/workspace", "/workspace") as line:
        before = {each.id for each in (await stats(client)).containers}
        request = requests.Run(
            image=persistent.image, command=("sh", "-c", line.script("sleep 1000; :"))
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(persistent.client.request, request)
            await line.started()
            told = await stats(client)
            (container,) = (each for each in told.containers if each.id not in before)
            assert (container.overlay, container.pid, container.program) == (None, None, None)
            assert told.workloads is not None
            assert told.workloads.cpu_us is not None
            assert (container.cpu_us or 0) <= told.workloads.cpu_us
            await shell(
                client, f"echo 1 >/sys/fs/cgroup/workloads/containers/{container.id}/cgroup.kill"
            )
    assert container.id not in {each.id for each in (await stats(client)).containers}


async def test_the_machine_itself_is_told_and_what_no_controller_counts_has_a_cause(
    client: AgentClient,
) -> None:
    told = await stats(client)
    assert told.cpu.count >= 1
    assert 0 < told.memory.available_bytes < told.memory.total_bytes
    assert "lo" in {each.name for each in told.network}
    assert told.agent is not None
    assert told.agent.cpu_us
    causes = {each.part: each.cause for each in told.missing}
    memory = "this cgroup2 hierarchy has no memory controller"
    assert causes["workloads.memory_bytes"] == memory
    assert (told.pressure is None) == ("pressure" in causes)
    assert await grown(client, lambda told: told.cpu.usage_us)
    assert await grown(client, lambda told: told.uptime_ms)
    assert told.left_out == 0
