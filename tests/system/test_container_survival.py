"""Containers that stay past the agent's death, and what becomes of them with the machine's."""

import random
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import ConnectionFailed, open_client
from tests.support.crash import kill_agent
from tests.support.execution import pull
from tests.support.images import Images
from tests.support.lifelines import lifeline_in
from tests.support.machine import Machine, booted
from tests.support.standing import (
    INIT,
    RUN_DIR,
    WORKSPACE,
    Persistent,
    containers_of,
    first_process,
    leftovers,
    output_of,
    persistent_overlay,
    pid_namespace,
    refused_cleanup,
    settled,
    whole_output,
)
from tests.support.watch import until


@asynccontextmanager
async def machine_with(
    registry: LocalRegistry, image: str, directory: Path
) -> AsyncIterator[Machine]:
    """A machine of a test's own, whose store has an image."""
    with booted(directory, insecure_registries=[registry.address]) as machine:
        async with open_client(machine.address) as client:
            await pull(client, image)
        yield machine


async def test_containers_outlive_an_agent_that_is_killed(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference
    async with machine_with(registry, image, tmp_path) as machine:
        with ExitStack() as held:
            lines = [
                held.enter_context(lifeline_in(machine, WORKSPACE, "/workspace")) for _ in range(5)
            ]
            detached, background, left, foreground, talked = lines
            async with (
                open_client(machine.address) as client,
                open_client(machine.address) as first,
                open_client(machine.address) as second,
            ):
                one, two = (Persistent(machine, client, image, name) for name in ("one", "two"))
                tell = "mkfifo /go; echo before; printf . >&9; read word </go; echo $word; "
                container_id = await one.detach(detached.script(tell + "exec sleep 1000"))
                pid = await two.background(background.script(tell + "exec sleep 1000"))
                await two.shell(f"({left.script('exec yes')}) &")
                script = foreground.script("(setsid sleep 1000 &); exec sleep 1000")
                await first.send(two.request("sh", "-c", script))
                await second.send(one.request("sh", "-c", talked.script("exec cat"), tty=True))
                for line in (*lines, detached, background):
                    await line.heard()
                namespaces = [await pid_namespace(each) for each in (one, two)]
                containers = sorted(containers_of(machine))
                await kill_agent(machine)
            # What was asked for in the foreground ends with its connection.
            await foreground.ended()
            await talked.ended()
            async with open_client(machine.address) as client:
                one, two = one.over(client), two.over(client)
                assert [await pid_namespace(each) for each in (one, two)] == namespaces
                assert sorted(containers_of(machine)) == containers
                assert all(line.is_held() for line in (detached, background, left))
                for each, name in ((one, container_id), (two, pid)):
                    await each.shell("echo after >/go")
                    await logged(machine, name, b"before\nafter\n")
                    await refused_cleanup(each)
                await one.end()
                await detached.ended()
                assert await whole_output(machine, container_id) == b"before\nafter\n"
                await one.cleanup()
                assert await first_process(two) == f"{INIT} -P"
                await client.request(requests.Shutdown())
            assert await trio.to_thread.run_sync(machine.wait) == 0
            for line in (background, left):
                assert not line.is_held()


async def logged(machine: Machine, name: str | int, text: bytes) -> None:
    """Wait until that is what a log holds."""
    output = output_of(machine, name)
    await until(lambda: output.read_bytes() == text, output)


@pytest.mark.parametrize("seed", range(10))
async def test_whenever_the_agent_is_killed_containers_can_be_used_and_cleaned_up_afterwards(
    registry: LocalRegistry, images: Images, tmp_path: Path, seed: int
) -> None:
    image = images.busybox.reference
    chance = random.Random(seed)
    names = ("one", "two", "three")
    async with machine_with(registry, image, tmp_path) as machine:
        async with open_client(machine.address) as client:
            async with persistent_overlay(machine, image) as overlay:
                await overlay.run("true")
            await settled(machine)
            before = await leftovers(client)
        # Init gives up on an agent that ends five times a minute.
        for _ in range(2):
            async with trio.open_nursery() as hosts:
                for name in names:
                    hosts.start_soon(busy_host, machine, image, name, chance)
                # A moment as any other: containers are being started, joined and replaced.
                await trio.sleep(chance.uniform(0, 0.3))
                await kill_agent(machine)
                hosts.cancel_scope.cancel()
        for name in names:
            async with persistent_overlay(machine, image, name) as overlay:
                await overlay.shell("echo works >/note")
                assert await overlay.shell("cat /note") == "works\n"
        await settled(machine)
        async with open_client(machine.address) as client:
            assert await leftovers(client) == before
        logs = list(machine.path(f"{RUN_DIR}/logs").glob("*"))
        assert [path.name for path in logs if path.name.startswith("+")] == []
        for log in logs:
            await until((log / "ended").exists, log)


async def busy_host(machine: Machine, image: str, name: str, chance: random.Random) -> None:
    """Ask for one thing after the other, until the agent is no more."""
    with suppress(ConnectionFailed):
        async with open_client(machine.address) as client:
            overlay = Persistent(machine, client, image, name)
            while True:
                script = chance.choice(("true", "sleep 1000 &", "exit 3", "(setsid yes &); ps"))
                mode = chance.choice((None, None, "detached", "background", "interactive", "tty"))
                fields = {} if mode is None else {mode: True}
                if chance.random() < 0.1:
                    await overlay.end()
                answer = await client.request(overlay.request("sh", "-c", script, **fields))
                assert not isinstance(answer, responses.Error), answer


async def test_shutdown_takes_no_time_over_containers_that_only_wait(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference
    async with machine_with(registry, image, tmp_path) as machine:
        async with open_client(machine.address) as client:
            for name in ("one", "two", "three"):
                await Persistent(machine, client, image, name).run("true")
            begun = time.monotonic()
            assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})
            assert time.monotonic() - begun < 1.5
        assert await trio.to_thread.run_sync(machine.wait) == 0


async def test_shutdown_asks_what_runs_in_a_container_to_end_before_it_kills(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference
    async with machine_with(registry, image, tmp_path) as machine:
        farewell = machine.storage / "workspace" / "farewell"
        polite = "trap 'echo bye from %s >>/workspace/farewell; exit' TERM; printf . >&9; %s"
        with (
            lifeline_in(machine, WORKSPACE, "/workspace") as one,
            lifeline_in(machine, WORKSPACE, "/workspace") as two,
        ):
            async with open_client(machine.address) as client:
                detached = Persistent(machine, client, image, "one")
                await detached.detach(one.script(polite % ("first", "sleep 1000 & wait")))
                background = Persistent(machine, client, image, "two")
                await background.background(two.script(polite % ("other", "sleep 1000 & wait")))
                for line in (one, one, two, two):
                    await line.heard()
                await client.request(requests.Shutdown())
            assert not one.is_held()
            assert not two.is_held()
        assert sorted(farewell.read_text().splitlines()) == ["bye from first", "bye from other"]


async def test_an_overlay_is_there_after_a_reboot(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference
    storage = tmp_path / "storage"
    storage.mkdir()
    for boot in ("first", "second"):
        with booted(
            tmp_path / boot, storage=storage, insecure_registries=[registry.address]
        ) as machine:
            async with open_client(machine.address) as client:
                overlay = Persistent(machine, client, image, "kept")
                if boot == "first":
                    await pull(client, image)
                    await overlay.shell("echo kept >/note; sleep 1000 &")
                else:
                    assert await overlay.shell("cat /note; pidof sleep || true") == "kept\n"
                await client.request(requests.Shutdown())
