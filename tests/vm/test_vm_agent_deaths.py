"""The agent killed at any moment of all that it can be in the middle of, again and again."""

import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol import AgentRequest, requests, responses
from protocol.client import AgentClient, ConnectionFailed, open_client
from tests.support.crash import kill_by, successor
from tests.support.execution import execute, pull, run, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine, booted
from tests.support.rounds import rounds
from tests.vm.conftest import empty_disk

MIB = 1 << 20
PATIENCE_S = 120
# init gives up at the sixth start within a minute.
MOST_DEATHS = 4
WITHIN_S = 61

# What an agent could leave behind: mounts (those of layers come and go with images), loop devices,
# cgroups but for this command's own, processes but for this one and the kernel's, descriptors.
SURVEY = """\
import glob, json, os
def lines(path):
    with open(path) as file:
        return file.read().splitlines()
own = lines("/proc/self/cgroup")[0].partition("::")[2]
agents = [pid for pid in lines("/sys/fs/cgroup/agent/cgroup.procs")
          if b"run_agent" in open(f"/proc/{pid}/cmdline", "rb").read()]
def processes():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0] and int(pid) != os.getpid():
            yield b" ".join(words[:3]).decode()
print(json.dumps({
    "mounts": sorted(path for path in (line.split()[4] for line in lines("/proc/self/mountinfo"))
                     if not path.startswith("/storage/layers/")),
    "loops": len(glob.glob("/sys/block/loop*/loop")),
    "cgroups": sorted(path for path, _, _ in os.walk("/sys/fs/cgroup") if not path.endswith(own)),
    "processes": sorted(processes()),
    "descriptors": len(os.listdir(f"/proc/{agents[0]}/fd")),
    "runs": sorted(os.listdir("/run/innkeep/runs")),
    "overlays": sorted(os.listdir("/storage/overlays")),
}))
"""

Work = Callable[[AgentClient], Awaitable[None]]


@pytest.mark.timeout(7200)
async def test_an_agent_that_dies_at_any_moment_comes_back_and_leaves_nothing_behind(
    vm_registry: str, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference_from(LOOPBACK_IN_VM)
    large = images.large.reference_from(LOOPBACK_IN_VM)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chances = random.Random(seed)
    with booted(
        tmp_path,
        kind="auto",
        storage=empty_disk(tmp_path, mib=2048),
        insecure_registries=[vm_registry],
    ) as machine:
        async with open_client(machine.address) as client:
            await pull(client, image)
            stays: dict[str, Any] = {"image": image, "persistent_overlay_id": "stays"}
            await started(client, requests.Run(command=("sleep", "98701"), detached=True, **stays))
            await started(client, requests.VmExec(command=("sleep", "98702"), background=True))
        works = works_of(image, large)
        await death(machine, works, chances)
        expected = await settled(machine, None)
        deaths = [time.monotonic()]
        for _ in range(rounds(3, 50) - 1):
            if len(deaths) >= MOST_DEATHS:
                # No event tells that a minute is over.
                await trio.sleep_until(
                    trio.current_time() + deaths[-MOST_DEATHS] + WITHIN_S - time.monotonic()
                )
            deaths.append(time.monotonic())
            await death(machine, works, chances)
            async with open_client(machine.address) as client:
                status = await client.request(requests.StorageStatus())
                assert isinstance(status, responses.Ok)
                assert isinstance(status.data, dict)
                assert status.data["ready"] is True
                await pull(client, image)
                joined = await run(client, image, "pidof", "sleep", persistent_overlay_id="stays")
                assert joined.exit_code == 0
            assert await settled(machine, expected) == expected
        async with open_client(machine.address) as client:
            # What all these pulls have left is of use, and whole.
            await pull(client, large)
            assert (await run(client, large)).exit_code == 0


async def started(client: AgentClient, request: AgentRequest) -> None:
    answer = await client.request(request)
    assert isinstance(answer, responses.Completed), answer
    assert answer.exit_code == 0


def works_of(image: str, large: str) -> list[Work]:
    """What goes on when the agent dies, each on a connection of its own and for ever."""

    async def commands(client: AgentClient) -> None:
        await execute(client, "sh", "-c", "echo hello; setsid sleep 0.2 & true")

    async def containers(client: AgentClient) -> None:
        # Not found, where another work has just forgotten it.
        await client.request(requests.Run(image=image, command=("true",)))

    async def joins(client: AgentClient) -> None:
        request = requests.Run(image=image, command=("true",), persistent_overlay_id="stays")
        await client.request(request)

    async def pulls(client: AgentClient) -> None:
        await client.request(requests.GarbageCollect(dry_run=False, purge_all=True))
        await pull(client, image)
        await pull(client, large)

    async def uploads(client: AgentClient) -> None:
        answer = await client.request(requests.FileWrite("/storage/workspace/new", bytes(MIB)))
        assert isinstance(answer, responses.Ok)

    async def output(client: AgentClient) -> None:
        stream = requests.VmExec(
            command=("head", "-c", str(8 * MIB), "/dev/zero"), interactive=True
        )
        async with client.stream(stream) as answers:
            async for _ in answers:
                pass

    return [commands, containers, joins, pulls, uploads, output]


async def death(machine: Machine, works: list[Work], chances: random.Random) -> None:
    """Kill the agent in the middle of all the works, and wait until the next one serves."""
    serving = successor(machine)

    async def work_on(work: Work) -> None:
        with suppress(ConnectionFailed):
            async with open_client(machine.address) as client:
                while True:
                    await work(client)

    async with trio.open_nursery() as nursery:
        for work in works:
            nursery.start_soon(work_on, work)
        async with open_client(machine.address) as client:
            # A moment by chance.
            await trio.sleep(chances.uniform(0, 5))
            await kill_by(client)
    await serving()


async def settled(machine: Machine, expected: object) -> object:
    """A survey of the machine: as it is expected, or what there is after PATIENCE_S.

    Without an expectation: two that are alike, a second apart. Nothing tells when the last that a
    dead agent has left is gone, and mostly it is so at once.
    """
    seen: object = None
    async with open_client(machine.address) as client:
        with trio.move_on_after(PATIENCE_S):
            while True:
                before, seen = seen, await survey(client)
                if seen == (before if expected is None else expected):
                    break
                await trio.sleep(1)
        await shell(client, "true")
    return seen


async def survey(client: AgentClient) -> object:
    done = await execute(client, "/usr/bin/python3", "-I", "-S", "-c", SURVEY)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)
