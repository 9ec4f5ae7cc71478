"""A persistent overlay of a machine made of namespaces, and the containers that stay on it."""

import os
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import orjson
import trio
from attrs import evolve, frozen

from agent.processes.cgroup import Cgroup
from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import Lifeline, lifeline, refusal, shell
from tests.support.machine import Machine
from tests.support.watch import until

CGROUPS = "/sys/fs/cgroup/workloads"
INIT = "/dev/.innkeep-init"
RUN_DIR = "/run/innkeep"
WORKSPACE = "/storage/workspace"


@frozen
class Persistent:
    """Commands of one `persistent_overlay_id`, over a connection of their own."""

    machine: Machine
    client: AgentClient
    image: str
    id: str

    @property
    def workload(self) -> str:
        """The id by which overlay requests know it."""
        return f"persistent-{self.id}"

    def request(self, *command: str, **fields: Any) -> requests.Run:
        fields = {"image": self.image, "persistent_overlay_id": self.id, **fields}
        return requests.Run(command=command, **fields)

    async def run(self, *command: str, **fields: Any) -> responses.Completed:
        """Run a command to its end, whatever its exit code."""
        answer = await self.client.request(self.request(*command, **fields))
        assert isinstance(answer, responses.Completed), answer
        return answer

    async def shell(self, script: str, **fields: Any) -> str:
        """What a shell script prints, which must succeed."""
        done = await self.run("sh", "-c", script, **fields)
        assert done.exit_code == 0, (script, done.exit_code, done.stdout, done.stderr)
        return done.stdout.decode()

    async def refusal(self, *command: str, **fields: Any) -> responses.Error:
        return await refusal(self.client, self.request(*command, **fields))

    async def detach(self, script: str, **fields: Any) -> str:
        """Start a container whose first process is a shell script; its id."""
        return await self._name_of(self.request("sh", "-c", script, detached=True, **fields))

    async def background(self, script: str, **fields: Any) -> int:
        """Start a shell script that outlives its request; its pid in the machine."""
        return int(await self._name_of(self.request("sh", "-c", script, background=True, **fields)))

    async def _name_of(self, request: requests.Run) -> str:
        answer = await self.client.request(request)
        assert isinstance(answer, responses.Completed), answer
        assert (answer.exit_code, answer.stderr) == (0, b"")
        return answer.stdout.decode("ascii")

    def over(self, client: AgentClient) -> Self:
        """The same overlay over another connection."""
        return evolve(self, client=client)

    @asynccontextmanager
    async def lifeline(self) -> AsyncIterator[Lifeline]:
        """One for scripts in the container; the workspace is where it lies."""
        async with lifeline(self.machine.address, WORKSPACE, "/workspace") as line:
            yield line

    async def prepare(self) -> dict[str, str]:
        """The overlay's OverlayInfo, as a request by its workload's name has it."""
        request = requests.PrepareOverlay(image=self.image, workload_id=self.workload)
        answer = await self.client.request(request)
        assert isinstance(answer, responses.Ok), answer
        assert isinstance(answer.data, dict)
        return answer.data

    async def cleanup(self) -> None:
        request = requests.CleanupOverlay(workload_id=self.workload)
        answer = await self.client.request(request)
        assert answer == responses.Ok(), answer

    async def cleanup_refusal(self) -> responses.Error:
        return await refusal(self.client, requests.CleanupOverlay(workload_id=self.workload))

    def containers(self) -> list[str]:
        """The ids of the containers that the agent knows for it."""
        return containers_of(self.machine, self.workload)

    async def end(self) -> None:
        """Kill whatever runs on the overlay."""
        for container_id in self.containers():
            await end_container(self.machine, container_id)


async def first_process(overlay: Persistent) -> str:
    """The command line of the first process of the container that a run joins or starts.

    A container runs a moment before its first process is executed, and is crun's own until then,
    whose end tells nobody inside.
    """
    script = "while grep -q ^crun /proc/1/cmdline; do :; done; tr '\\0' ' ' </proc/1/cmdline"
    return (await overlay.shell(script)).strip()


async def pid_namespace(overlay: Persistent) -> str:
    """What tells one container from another."""
    return await overlay.shell("readlink /proc/self/ns/pid")


async def refused_cleanup(overlay: Persistent) -> None:
    error = await overlay.cleanup_refusal()
    assert error.code == "CLEANUP_FAILED"
    assert overlay.workload in error.message
    assert "the container of process" in error.message
    assert (overlay.machine.storage / "overlays" / overlay.workload / "merged").is_dir()


def containers_of(machine: Machine, workload: str | None = None) -> list[str]:
    """The ids of the containers that a workload has in a machine, or that all have."""
    found = []
    for record in machine.path(f"{RUN_DIR}/containers").glob("*/container.json"):
        try:
            known = orjson.loads(record.read_bytes())
        except FileNotFoundError:
            continue  # it ended meanwhile
        if workload in (None, known["workload"]):
            found.append(record.parent.name)
    return found


def cgroup_of_container(machine: Machine, container_id: str) -> Cgroup:
    """As this machine sees it."""
    places = machine.path(CGROUPS).glob(f"*/{container_id}")
    return Cgroup(next(places, machine.path(f"{CGROUPS}/containers/{container_id}")))


async def end_container(machine: Machine, container_id: str) -> None:
    """Kill a container from outside, and wait for the end of all its processes."""
    cgroup = cgroup_of_container(machine, container_id)
    with ExitStack() as held:
        processes = []
        for pid in cgroup.pids():
            with suppress(ProcessLookupError):
                processes.append(os.pidfd_open(pid))
                held.callback(os.close, processes[-1])
        with suppress(OSError):  # it may go at any moment
            cgroup.kill()
        with trio.fail_after(10):
            for process in processes:
                await trio.lowlevel.wait_readable(process)


async def settled(machine: Machine, *kept: str) -> None:
    """Wait until the agent has cleaned up after all commands in containers, and all containers but
    those of `kept` ids: what ran in them ends or has ended."""
    places = (f"{RUN_DIR}/containers", f"{CGROUPS}/containers", f"{CGROUPS}/privileged")
    for directory in map(machine.path, places):
        await until(partial(_holds_only, directory, kept), directory)
    for container_id in kept:
        path = cgroup_of_container(machine, container_id).path
        await until(partial(_holds_only, path, ("first",)), path)


def _holds_only(path: Path, names: Sequence[str]) -> bool:
    return all(entry.name in names or not entry.is_dir() for entry in path.iterdir())


async def leftovers(client: AgentClient) -> dict[str, str]:
    """What commands and containers may leave in a machine, as text to compare."""
    scripts = {
        "cgroups": f"cd {CGROUPS}; find containers privileged -type d | sort",
        "mounts": "cut -d' ' -f5- /proc/self/mountinfo | sort",
        "overlays": "ls -A /storage/overlays",
        # crun keeps a cache there, and logs outlive what they are of.
        "files": f"cd {RUN_DIR}; find containers runs crun ! -name '.*' | sort",
        "processes": f"cd {CGROUPS}; find containers privileged -name cgroup.procs | xargs cat",
    }
    return {what: await shell(client, script) for what, script in scripts.items()}


@asynccontextmanager
async def persistent_overlay(
    machine: Machine, image: str, overlay_id: str | None = None
) -> AsyncIterator[Persistent]:
    """One for the block, of an image in the machine's store; nothing of it is left afterwards."""
    name = overlay_id or f"test-{secrets.token_hex(4)}"
    async with open_client(machine.address) as client:
        overlay = Persistent(machine, client, image, name)
        yield overlay
        await overlay.end()
        await overlay.cleanup()
    assert not (machine.storage / "overlays" / overlay.workload).exists()


def output_of(machine: Machine, name: str | int) -> Path:
    """The log of a detached container or of a background process, by its id or pid."""
    return machine.path(f"{RUN_DIR}/logs/{name}/output")


async def whole_output(machine: Machine, name: str | int) -> bytes:
    """All that is kept of what one has written, when all of it has ended."""
    output = output_of(machine, name)
    await until((output.parent / "ended").exists, output.parent)
    older = output.with_name("output.1")
    return b"".join(file.read_bytes() for file in (older, output) if file.exists())
