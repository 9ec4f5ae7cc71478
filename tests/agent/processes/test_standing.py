"""Containers that stay: real ones, by crun on a busybox tree, without an overlay below."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio

from agent.errors import AgentError
from agent.processes.bundle import INIT_PATH
from agent.processes.cgroup import Cgroup
from agent.processes.collect import Collected
from agent.processes.command import Bind, ContainerCommand
from agent.processes.container import ContainerRuntime
from agent.processes.service import open_processes
from agent.processes.standing import StandingContainers
from agent.processes.standing_container import StandingContainer
from protocol.errors import ErrorCode
from tests.support.image_info import image_info
from tests.support.lifelines import Lifeline, lifeline
from tests.support.watch import until

PATIENCE_S = 30

IMAGE = image_info(env=("PATH=/bin", "OF=image"))


@attrs.frozen
class Standing:
    """Runs commands in the containers of one workload."""

    containers: StandingContainers
    runtime: ContainerRuntime
    where: Path
    workload: str = "persistent-test"

    def command(self, script: str, *binds: Bind, **fields: object) -> ContainerCommand:
        argv = ("sh", "-c", script)
        command = ContainerCommand.from_request("test", IMAGE, argv, binds=binds)
        return attrs.evolve(command, **fields)

    async def rootfs(self) -> Path:
        return self.where

    @asynccontextmanager
    async def joined(self, command: ContainerCommand) -> AsyncIterator[StandingContainer]:
        async with self.containers.joined(self.workload, command, self.rootfs) as container:
            yield container

    async def run(self, script: str, *binds: Bind, **fields: object) -> Collected:
        command = self.command(script, *binds, **fields)
        with trio.fail_after(PATIENCE_S):
            async with (
                self.joined(command) as container,
                self.runtime.joining(
                    command, container.id, container.pid, container.cgroup.path
                ) as running,
            ):
                return await running.collect()

    async def printed(self, script: str, *binds: Bind, **fields: object) -> str:
        collected = await self.run(script, *binds, **fields)
        assert (collected.exit_code, collected.stderr) == (0, b""), collected
        return collected.stdout.decode()

    async def detach(self, script: str, *binds: Bind) -> str:
        with trio.fail_after(PATIENCE_S):
            command = self.command(script, *binds)
            return await self.containers.start_detached(self.workload, command, self.rootfs)

    def known(self) -> list[StandingContainer]:
        return self.containers.of(self.workload)

    async def ended(self) -> None:
        """Wait until all of the workload's containers have ended and are cleaned up after."""
        with trio.fail_after(PATIENCE_S):
            for container in self.known():
                await container.ended.wait()

    def end(self) -> None:
        for container in self.known():
            container.cgroup.kill()


@pytest.fixture
async def standing(runtime: ContainerRuntime, rootfs: Path) -> AsyncIterator[Standing]:
    standing = Standing(StandingContainers.open(runtime), runtime, rootfs)
    yield standing
    standing.end()
    await standing.ended()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Lifeline]:
    (tmp_path / "line").mkdir()
    with lifeline(tmp_path / "line", Path("/line")) as held:
        yield held


@pytest.fixture
def held(tmp_path: Path) -> Bind:
    """Where scripts find the lifeline."""
    return Bind(str(tmp_path / "line"), "/line")


def text_of(runtime: ContainerRuntime, name: str) -> Callable[[], bool]:
    return (runtime.processes.logs.directory / name / "ended").exists


async def test_commands_share_a_container_with_the_agents_init(standing: Standing) -> None:
    first = await standing.printed("readlink /proc/self/ns/pid; tr '\\0' ' ' </proc/1/cmdline")
    second = await standing.printed("readlink /proc/self/ns/pid; tr '\\0' ' ' </proc/1/cmdline")
    assert first == second
    assert first.endswith(f"{INIT_PATH} -P ")
    (container,) = standing.known()
    assert container.has_own_init
    assert container.is_idle()


async def test_nothing_of_the_agents_init_is_in_the_root(standing: Standing) -> None:
    before = {str(path) for path in standing.where.rglob("*")}
    await standing.printed("ls -l /dev/.innkeep-init")
    after = {str(path) for path in standing.where.rglob("*") if not path.is_dir()}
    new = {name.removeprefix(f"{standing.where}/") for name in after - before}
    assert new <= {"etc/hosts", "etc/hostname", "etc/resolv.conf"}


async def test_callers_at_once_share_the_first_container(standing: Standing) -> None:
    seen: set[str] = set()

    async def run_one() -> None:
        seen.add(await standing.printed("readlink /proc/self/ns/pid"))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(run_one)
    assert len(seen) == len(standing.known()) == 1


async def test_a_container_is_idle_only_when_nothing_runs_in_it(
    standing: Standing, line: Lifeline, held: Bind
) -> None:
    async with standing.joined(standing.command("true")) as container:
        assert not container.is_idle()
    assert container.is_idle()
    await standing.run(f"({line.script('exec sleep 1000')}) &", held)
    await line.heard()
    assert not container.is_idle()
    async with standing.containers.released(standing.workload):
        assert not container.has_ended
    await standing.run("kill $(pidof sleep)")
    await line.ended()
    await standing.runtime.processes.seen_off(container.cgroup.path, but="first")
    assert container.is_idle()


async def test_releasing_a_workload_ends_the_container_that_only_waits(standing: Standing) -> None:
    await standing.run("true")
    (container,) = standing.known()
    async with standing.containers.released(standing.workload):
        assert container.ended.is_set()
        assert standing.known() == []
        assert not container.cgroup.path.exists()
        assert not container.directory.exists()


async def test_a_released_workload_starts_nothing_meanwhile(standing: Standing) -> None:
    async with trio.open_nursery() as nursery, standing.containers.released(standing.workload):
        nursery.start_soon(standing.run, "true")
        await trio.testing.wait_all_tasks_blocked()
        assert standing.known() == []
    assert len(standing.known()) == 1


async def test_a_detached_command_replaces_what_only_waits_and_nothing_else(
    standing: Standing, line: Lifeline, held: Bind
) -> None:
    await standing.run("true")
    (idle,) = standing.known()
    first = await standing.detach(line.script("exec sleep 1000"), held)
    await line.heard()
    assert idle.ended.is_set()
    second = await standing.detach("exec sleep 2000")
    assert [container.id for container in standing.known()] == [first, second]
    assert "2000" in await standing.printed("cat /proc/1/cmdline")
    standing.known()[-1].cgroup.kill()
    await standing.known()[-1].ended.wait()
    assert "1000" in await standing.printed("cat /proc/1/cmdline")


async def test_a_container_that_ends_is_not_joined_even_before_its_end_is_seen_to(
    standing: Standing,
) -> None:
    await standing.detach("exec sleep 1000")
    (container,) = standing.known()
    container.cgroup.kill()
    await until_gone(container.pid)
    assert container.has_ended
    assert INIT_PATH in await standing.printed("cat /proc/1/cmdline")


async def test_a_detached_command_may_be_over_before_anybody_looks(standing: Standing) -> None:
    logs = standing.runtime.processes.logs.directory
    for number in range(10):
        name = await standing.detach(f"echo {number}")
        await until(text_of(standing.runtime, name), logs / name)
        assert (logs / name / "output").read_text() == f"{number}\n"
    await standing.ended()
    assert standing.known() == []
    assert list(standing.runtime.directory.iterdir()) == []


async def test_a_container_that_cannot_start_leaves_nothing(standing: Standing) -> None:
    for argv in (("no-such-program",), ("/etc/passwd",)):
        command = attrs.evolve(standing.command(""), argv=argv)
        with pytest.raises(AgentError) as raised:
            await standing.containers.start_detached(standing.workload, command, standing.rootfs)
        assert raised.value.code is ErrorCode.RUN_FAILED
        assert argv[0] in raised.value.message
    bad = StandingContainers.open(standing.runtime, init="/no/such/init")
    with pytest.raises(AgentError):
        await attrs.evolve(standing, containers=bad).run("true")
    assert list(standing.runtime.directory.iterdir()) == []
    tree = standing.runtime.processes.tree
    assert tree is not None
    assert Cgroup.all_in(tree.containers) == []


async def test_a_mount_is_made_in_the_running_container_once(
    standing: Standing, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").write_text("shared\n")
    bind = Bind(str(tmp_path / "shared"), "/made/here")
    await standing.run("true")
    for _ in range(2):
        script = "cat /made/here/file; grep -c /made/here /proc/self/mountinfo"
        assert await standing.printed(script, bind) == "shared\n1\n"
    with pytest.raises(AgentError) as raised:
        await standing.run("true", attrs.evolve(bind, read_only=True))
    assert raised.value.code is ErrorCode.MOUNT_FAILED
    assert "/made/here" in raised.value.message


async def test_what_gives_way_is_hidden_and_never_hides(standing: Standing, tmp_path: Path) -> None:
    for name in ("workspace", "share"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    workspace = Bind(str(tmp_path / "workspace"), "/work", gives_way=True)
    share = Bind(str(tmp_path / "share"), "/work")
    assert await standing.printed("ls /work", workspace) == "workspace\n"
    assert await standing.printed("ls /work", share) == "share\n"
    assert await standing.printed("ls /work", workspace) == "share\n"


async def test_at_the_end_idle_containers_go_at_once_and_others_when_they_are_empty(
    standing: Standing, line: Lifeline, held: Bind, tmp_path: Path
) -> None:
    other = attrs.evolve(standing, workload="persistent-other")
    await standing.run("true")
    script = "trap 'echo bye >/line/farewell; exit' TERM; printf . >&9; sleep 1000 & wait"
    await other.run(f"({line.script(script)}) >/dev/null 2>&1 &", held)
    for _ in range(2):
        await line.heard()
    (idle,), (busy,) = standing.known(), other.known()
    await standing.containers.end_idle()
    assert idle.ended.is_set()
    assert not busy.has_ended
    with trio.fail_after(PATIENCE_S):
        # The init would end at this, and take the others with it before they can say goodbye.
        busy.cgroup.terminate()
        await busy.ended.wait()
    assert (tmp_path / "line" / "farewell").read_text() == "bye\n"


# The next agent


@asynccontextmanager
async def next_agent(
    cgroup_root: Path, tmp_path: Path, before: ContainerRuntime
) -> AsyncIterator[Standing]:
    async with open_processes(cgroup_root, tmp_path / "logs") as processes:
        runtime = ContainerRuntime.open(processes, tmp_path / "run", crun=str(tmp_path / "crun"))
        assert runtime.directory == before.directory
        yield Standing(StandingContainers.open(runtime), runtime, tmp_path / "rootfs")
        await processes.stop_all(grace_s=0)
        for container in runtime.directory.iterdir():
            await until(lambda: not any(runtime.directory.iterdir()), container.parent)


@asynccontextmanager
async def first_agent(cgroup_root: Path, tmp_path: Path, crun: str) -> AsyncIterator[Standing]:
    async with open_processes(cgroup_root, tmp_path / "logs") as processes:
        runtime = ContainerRuntime.open(processes, tmp_path / "run", crun=crun)
        yield Standing(StandingContainers.open(runtime), runtime, tmp_path / "rootfs")


async def test_the_next_agent_takes_over_what_runs_with_its_order_and_mounts(
    cgroup_root: Path, rootfs: Path, tmp_path: Path, runtime: ContainerRuntime
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").write_text("shared\n")
    bind = Bind(str(tmp_path / "shared"), "/shared")
    crun = str(tmp_path / "crun")
    async with first_agent(cgroup_root, tmp_path, crun) as standing:
        first = await standing.detach("exec sleep 1000", bind)
        second = await standing.detach("exec sleep 2000")
        await standing.run("true", bind)
    async with next_agent(cgroup_root, tmp_path, standing.runtime) as standing:
        assert [container.id for container in standing.known()] == [first, second]
        assert not any(container.has_own_init for container in standing.known())
        script = "cat /shared/file; grep -c /shared /proc/self/mountinfo; cat /proc/1/cmdline"
        assert (await standing.printed(script, bind)).startswith("shared\n1\nsleep\x002000")
        with pytest.raises(AgentError):
            await standing.run("true", attrs.evolve(bind, read_only=True))


async def test_the_next_agent_removes_what_has_ended_or_was_never_finished(
    cgroup_root: Path, rootfs: Path, tmp_path: Path, runtime: ContainerRuntime
) -> None:
    async with first_agent(cgroup_root, tmp_path, str(tmp_path / "crun")) as standing:
        await standing.detach("exec sleep 1000")
        (container,) = standing.known()
        directory = standing.runtime.directory
    container_pid = container.pid
    for name, record in (("torn", "{"), ("strange", "[]"), ("other", '{"workload": "x"}')):
        (directory / name).mkdir()
        (directory / name / "container.json").write_text(record)
    (directory / "bare").mkdir()
    stray = Cgroup.make(container.cgroup.path.parent, "stray")
    stray.keep()
    # As it is when a reboot of nothing but the agent comes after the container's end.
    container.cgroup.kill()
    await until_gone(container_pid)
    async with next_agent(cgroup_root, tmp_path, standing.runtime) as standing:
        with trio.fail_after(PATIENCE_S):
            parent = container.cgroup.path.parent
            await until(lambda: Cgroup.all_in(parent) == [], parent)
        assert standing.known() == []
        assert list(directory.iterdir()) == []
        assert INIT_PATH in await standing.printed("cat /proc/1/cmdline")


async def until_gone(pid: int) -> None:
    """Wait for the end of a process that may be anybody's child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with trio.fail_after(PATIENCE_S):
        await trio.lowlevel.wait_readable(descriptor)
    os.close(descriptor)
