"""A machine's whole life: its agent killed and back, its end, and what is left of it then."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses, values
from protocol.client import ConnectionFailed, open_client
from tests.support.crash import kill_agent
from tests.support.execution import execute, pull, refusal, run, shell
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.process_tree import descendants, is_running


async def test_an_agent_that_is_killed_is_back_with_its_images_and_overlays(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        image = images.whiteouts.reference
        async with open_client(machine.address) as client:
            info = await pull(client, image)
            overlay = requests.PrepareOverlay(image=image, workload_id="survivor")
            prepared = await client.request(overlay)
            await shell(client, "touch /storage/overlays/survivor/merged/kept")
            begun = time.monotonic()
            await kill_agent(machine)
        async with open_client(machine.address) as client:
            assert isinstance(await client.request(requests.Ping()), responses.Pong)
            assert time.monotonic() - begun < 3
            assert await client.request(requests.Query(image=image)) == responses.Ok(info)
            assert await client.request(overlay) == prepared
            assert await shell(client, "ls /storage/overlays/survivor/merged/kept")
            assert (await run(client, image, "true")).exit_code == 0


async def test_a_pull_that_died_with_its_agent_succeeds_with_the_next(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.large
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        async with (
            open_client(machine.address) as client,
            client.stream(requests.Pull(image=image.reference)) as answers,
        ):
            async for answer in answers:
                assert isinstance(answer, responses.Progress)
                break
            await kill_agent(machine)
        async with open_client(machine.address) as client:
            assert (await refusal(client, requests.Query(image=image.reference))).code == (
                "NOT_FOUND"
            )
            assert (await pull(client, image.reference))["digest"] == image.config_digest
            assert (await run(client, image.reference)).exit_code == 0


# In the agent's place among the cgroups, with each of its sockets (pidfd_getfd(2)): as a child of
# the agent that never comes to execute its program.
HOLDER = """\
import ctypes, os, time
syscall = ctypes.CDLL(None, use_errno=True).syscall
cgroup = "/sys/fs/cgroup/agent/cgroup.procs"
agent = int(open(cgroup).readline())
file = os.pidfd_open(agent)
for name in os.listdir(f"/proc/{agent}/fd"):
    if os.readlink(f"/proc/{agent}/fd/{name}").startswith("socket:"):
        assert syscall(438, file, int(name), 0) >= 0, os.strerror(ctypes.get_errno())
open(cgroup, "w").write("0")
open("/tmp/holds", "w").close()
time.sleep(1000)
"""


async def test_a_child_of_a_dead_agent_that_never_executes_anything_goes_before_the_next_one(
    tmp_path: Path,
) -> None:
    holder = ("/usr/bin/python3", "-I", "-S", "-c", HOLDER)
    with booted(tmp_path) as machine:
        async with open_client(machine.address) as client:
            await execute(client, "mkfifo", "/tmp/holds")
            pid = (await execute(client, *holder, background=True)).stdout.decode().strip()
            await execute(client, "cat", "/tmp/holds")
        await kill_agent(machine)
        async with open_client(machine.address) as client:
            assert (await execute(client, "test", "-e", f"/proc/{pid}")).exit_code == 1
        assert "already in use" not in machine.console_text()


def test_an_agent_that_dies_again_and_again_ends_the_machine_with_the_reason(
    tmp_path: Path,
) -> None:
    with booted(tmp_path) as machine:
        for _ in range(5):
            trio.run(kill_agent, machine)
        os.kill(machine.agent_pid(), signal.SIGKILL)
        assert machine.wait() != 0
        assert "giving up" in machine.console_text()


async def test_shutdown_stops_everything_answers_and_ends_the_machine(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        async with open_client(machine.address) as client, open_client(machine.address) as other:
            await pull(client, image)
            await client.request(requests.PrepareOverlay(image=image, workload_id="left"))
            await other.send(requests.Run(image=image, command=("sleep", "1000")))
            begun = time.monotonic()
            answer = await client.request(requests.Shutdown())
            assert time.monotonic() - begun < 4
            assert answer == responses.Ok({"shutdown": True})
        assert await trio.to_thread.run_sync(machine.wait) == 0


async def test_a_shutdown_whose_sender_leaves_at_once_happens_all_the_same(
    tmp_path: Path,
) -> None:
    with booted(tmp_path) as machine:
        async with open_client(machine.address) as client:
            await client.send(requests.Shutdown())
        assert await trio.to_thread.run_sync(machine.wait) == 0


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("halt", "powering off"),
        ("kill -PWR 1", "powering off"),
        ("kill -INT 1", "restarting"),
    ],
)
async def test_init_ends_the_machine_in_order_however_it_is_told(
    tmp_path: Path, told: str, says: str
) -> None:
    with booted(tmp_path) as machine:
        async with open_client(machine.address) as client:
            # The machine's end may be faster than the command's own.
            with suppress(ConnectionFailed):
                await execute(client, "sh", "-c", told)
        assert await trio.to_thread.run_sync(machine.wait) == 0
        assert f"init: {says}\n" in machine.console_text()
        assert "stopping on SIGTERM" in machine.console_text()
        assert "not having stopped everything" not in machine.console_text()


async def test_storage_of_an_ended_machine_is_found_by_the_next(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.sixty_layers.reference
    storage = tmp_path / "storage"
    storage.mkdir()
    with booted(
        tmp_path / "first", storage=storage, insecure_registries=[registry.address]
    ) as machine:
        async with open_client(machine.address) as client:
            info = await pull(client, image)
            overlay = requests.PrepareOverlay(image=image, workload_id="kept")
            prepared = await client.request(overlay)
            await shell(client, "echo kept >/storage/overlays/kept/merged/note")
            await client.request(requests.Shutdown())
    with booted(tmp_path / "second", storage=storage) as machine:
        async with open_client(machine.address) as client:
            assert await client.request(requests.Query(image=image)) == responses.Ok(info)
            # Hosts read the layers after boot, without asking for anything before.
            top = info["layers"][-1].removeprefix("sha256:")
            assert await shell(client, f"cat /storage/layers/{top}/layers/top") == "59\n"
            assert await client.request(overlay) == prepared
            assert await shell(client, "cat /storage/overlays/kept/merged/note") == "kept\n"
            assert (await run(client, image)).stdout == b"59\n"


@pytest.mark.parametrize("end", ["shutdown", "SIGTERM", "SIGTERM in mid-pull"])
def test_nothing_of_a_machine_is_left_behind(
    registry: LocalRegistry, images: Images, tmp_path: Path, end: str
) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    with booted(
        tmp_path,
        insecure_registries=[registry.address],
        # What it makes for the time being is seen there, if it is left.
        env={"TMPDIR": str(tmp_path)},
    ) as machine:
        processes, groups = trio.run(use, machine, images, end)
        if end == "shutdown":
            machine.wait()
    assert [pid for pid in processes if is_running(pid)] == []
    assert [group for group in groups if group.exists()] == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["console.log", "storage"]
    assert users_of(tmp_path) == []


async def use(machine: Machine, images: Images, end: str) -> tuple[set[int], set[Path]]:
    """Have the machine do a bit of everything, up to the `end`; its processes and cgroups."""
    image = images.busybox.reference
    async with open_client(machine.address) as client, open_client(machine.address) as other:
        await pull(client, image)
        await run(client, image)
        await client.request(requests.PrepareOverlay(image=image, workload_id="left"))
        await other.send(requests.Run(image=image, command=("sleep", "1000")))
        processes = set(descendants(machine.pid))
        groups = {cgroup_of(pid) for pid in processes} - {cgroup_of(os.getpid())}
        assert machine.agent_pid() in processes
        if end == "shutdown":
            await client.request(requests.Shutdown())
        elif end == "SIGTERM in mid-pull":
            await client.send(requests.Pull(image=images.large.reference))
            await client.receive()
    return processes, groups


async def test_secrets_never_reach_the_console(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    secret = "hunter2-do-not-tell"
    env = (("TOKEN", secret),)
    image = images.busybox.reference
    auth = values.RegistryAuth(username="user", password=secret)
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        async with open_client(machine.address) as client:
            for pulled in (image, f"{registry.address}/absent", "localhost:1/absent"):
                await client.request(requests.Pull(image=pulled, auth=auth))
            proxy = f"http://user:{secret}@127.0.0.1:1"
            await client.request(requests.Pull(image="localhost:1/absent", proxy=proxy))
            reveal = ("sh", "-c", "echo $TOKEN")
            assert secret in (await execute(client, *reveal, env=env)).stdout.decode()
            await execute(client, "cat", stdin_data=secret)
            await client.request(requests.VmExec(command=("no-such",), env=env))
            assert secret in (await run(client, image, *reveal, env=env)).stdout.decode()
            await client.request(requests.Run(image=image, command=("no-such",), env=env))
            await client.request(requests.Run(image=image, command=("true",), user="no-one"))
            await client.request(requests.FileWrite(path="/x", data=secret.encode()))
            await client.request(requests.Shutdown())
        machine.wait()
        said = machine.console_text()
        assert "pull" in said
        assert secret not in said
        assert secret.encode().hex() not in said
        for path in machine.storage.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes()


def cgroup_of(pid: int) -> Path:
    """Its cgroup of version 2, as this machine sees it."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    (group,) = (line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
    (root,) = (
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if " - cgroup2 " in line
    )
    return Path(root) / group


def users_of(directory: Path) -> list[str]:
    """Processes that have a file below `directory` open, stand there, or name it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
            places = [str(link.readlink()) for link in links]
            words = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if any(str(directory) in place for place in [*places, words]):
            found.append(words)
    return found


async def test_a_shutdown_ends_what_others_are_in_the_middle_of_and_tells_them(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        async with (
            open_client(machine.address) as client,
            open_client(machine.address) as pulling,
            open_client(machine.address) as uploading,
            open_client(machine.address) as running,
            open_client(machine.address) as late,
            trio.open_nursery() as nursery,
        ):
            await pulling.send(requests.Pull(image=images.large.reference))
            assert isinstance(await pulling.receive(), responses.Progress)
            begin = requests.FileWriteBegin(path="/storage/workspace/half", total_size=10_000_000)
            assert isinstance(await uploading.request(begin), responses.Ok)
            await uploading.send(requests.FileWriteChunk(bytes(1_000_000), done=False))
            assert isinstance(await uploading.receive(), responses.Ok)
            await running.send(requests.VmExec(command=("sleep", "1000"), interactive=True))
            assert isinstance(await running.receive(), responses.Started)
            # It is there until it is killed, and so is the rest of the machine.
            stubborn = "trap '' TERM; while :; do sleep 1000; done"
            await execute(client, "sh", "-c", stubborn, background=True)

            async def shut_down() -> None:
                answer = await client.request(requests.Shutdown())
                assert answer == responses.Ok({"shutdown": True})

            nursery.start_soon(shut_down)
            for cut_off in (pulling, uploading):
                while isinstance(last := await cut_off.receive(), responses.Progress):
                    pass
                assert last == responses.Error("the agent is shutting down", "INVALID_REQUEST")
            for request in (requests.VmExec(command=("true",)), requests.StorageStatus()):
                assert await late.request(request) == last
            assert isinstance(await late.request(requests.Ping()), responses.Pong)
            done = await running.receive()
            # Its processes are ended, and it is told how.
            assert isinstance(done, responses.Exited)
            assert done.exit_code == 143
        assert await trio.to_thread.run_sync(machine.wait) == 0
        assert "internal error" not in machine.console_text()
    assert not (tmp_path / "storage/workspace/half").exists()
