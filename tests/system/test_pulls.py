"""Pulls over time: what they tell, what they fetch again, and what one leaves the next."""

import os
from pathlib import Path

import trio

from initramfs.local_registry import LocalRegistry
from protocol import decode_value, requests, responses
from protocol.client import AgentClient, open_client
from protocol.values import PullPlan
from tests.support.execution import execute, pull, run
from tests.support.images import Images
from tests.support.layout import zstd_layer
from tests.support.machine import Machine
from tests.support.misbehaving_registry import MisbehavingRegistry
from tests.support.proxy import http_proxy
from tests.support.store import wrong_blobs
from tests.support.tarballs import entry, tarball


async def test_progress_counts_layers_and_bytes_and_never_falls(
    machine: Machine, images: Images
) -> None:
    # Of its own, since the machine has what other tests have pulled.
    layers = [images.noise_layer(f"progress {number}") for number in range(4)]
    image = images.variant("progress", {"Cmd": ["true"]}, *layers)
    async with open_client(machine.address) as client:
        messages = []
        percents = []
        async with client.stream(requests.Pull(image=image.reference)) as answers:
            async for answer in answers:
                if isinstance(answer, responses.Progress):
                    messages.append(answer.message)
                    if answer.percent is not None:
                        percents.append(answer.percent)
        assert isinstance(answer, responses.Ok), answer
    assert percents == sorted(percents)
    assert all(0 <= percent <= 100 for percent in percents)
    counted = [text for text in messages if text.startswith("Pulling layer ")]
    assert counted
    numbers = [int(text.split()[2].partition("/")[0]) for text in counted]
    assert numbers == sorted(numbers)
    assert {text.partition("/")[2] for text in counted} == {"5"}


async def test_a_pull_can_be_planned_before_anything_is_fetched(
    client: AgentClient, images: Images
) -> None:
    pong = await client.ask(requests.Ping(), responses.Pong)
    assert {"pull-plan-v1", "pull-progress-v1"} <= set(pong.capabilities)
    image = images.variant("planned", {"Cmd": ["true"]}, images.noise_layer("planned"))
    request = requests.Pull(image=image.reference, dry_run=True)
    plan = decode_value((await client.ask(request, responses.Ok)).data, PullPlan)
    assert plan.digest == image.config_digest
    assert tuple(layer.digest for layer in plan.layers) == image.layers
    assert plan.fetch_bytes >= 1 << 20
    query = requests.Query(image=image.reference)
    assert (await client.ask(query, responses.Error)).code == "NOT_FOUND"
    await pull(client, image.reference)
    plan = decode_value((await client.ask(request, responses.Ok)).data, PullPlan)
    assert plan.fetch_bytes == 0


async def test_a_second_pull_fetches_nothing_but_the_manifest(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    reference = images.sixty_layers.reference
    await pull(client, reference)
    before = fetched(registry)
    await pull(client, reference)
    since = fetched(registry)[len(before) :]
    assert since
    assert all("/v2/sixty-layers/manifests/" in request for request in since)


async def test_a_layer_that_another_image_brought_is_not_fetched_again(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    await pull(client, images.busybox.reference)
    (shared,) = images.busybox.layers
    image = images.variant("shares", {"Cmd": ["true"]}, images.noise_layer("shares"))
    before = fetched(registry)
    await pull(client, image.reference)
    since = fetched(registry)[len(before) :]
    assert any(image.layers[-1] in request for request in since)
    assert not any(shared in request for request in since)


async def test_mirrors_are_configured_by_files_in_the_machine(
    registry: LocalRegistry, machine: Machine, client: AgentClient, images: Images
) -> None:
    hosts = machine.path("/etc/innkeep/certs.d/mirrored.invalid/hosts.toml")
    hosts.parent.mkdir(parents=True)
    hosts.write_text(f'[host."http://{registry.address}"]\n')
    reference = images.busybox.reference.replace(registry.address, "mirrored.invalid")
    info = await pull(client, reference)
    assert (info["reference"], info["digest"]) == (reference, images.busybox.config_digest)
    assert (await run(client, reference, "echo", "here")).stdout == b"here\n"


async def test_a_pull_goes_through_the_proxy_that_it_names_but_for_the_hosts_that_it_lists(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    image = images.variant("proxied", {"Cmd": ["true"]}, images.noise_layer("proxied"))
    with http_proxy() as proxy:
        through = f"http://{proxy.address}"
        around = requests.Pull(
            image=image.reference, proxy=through, no_proxy=f"registry.invalid,{registry.address}"
        )
        await client.ask(around, responses.Ok)
        assert proxy.requests == []
        await client.ask(requests.Pull(image=image.reference, proxy=through), responses.Ok)
        [asked] = proxy.requests
        assert asked.startswith(f"HEAD http://{registry.address}/v2/proxied/manifests/")


async def test_a_pull_takes_no_more_memory_for_larger_layers(
    machine: Machine, client: AgentClient, misbehaving: MisbehavingRegistry
) -> None:
    """What it has in memory of a layer are some blocks, of whatever there is in it."""
    peaks = []
    for noise_mib, zeros_mib in ((1, 1), (1, 1), (40, 100)):
        noise = entry("noise", os.urandom(noise_mib << 20))
        tar = tarball(noise, entry("zeros", bytes(zeros_mib << 20)))
        misbehaving.add_image("memory", [zstd_layer(tar)])
        forget_peak(machine.agent_pid())
        await pull(client, misbehaving.reference("memory"))
        peaks.append(peak_bytes(machine.agent_pid()))
    assert peaks[2] - peaks[1] < 20 << 20, peaks


async def test_a_tag_that_moved_is_pulled_anew(client: AgentClient, images: Images) -> None:
    first = images.variant("moving", {"Cmd": ["echo", "first"]})
    assert (await pull(client, first.reference))["cmd"] == ["echo", "first"]
    second = images.variant("moving", {"Cmd": ["echo", "second"]})
    assert second.reference == first.reference
    info = await pull(client, second.reference)
    assert (info["cmd"], info["digest"]) == (["echo", "second"], second.config_digest)
    assert (await run(client, second.reference)).stdout == b"second\n"


async def test_a_pull_whose_peer_hangs_up_leaves_what_the_next_one_needs(
    machine: Machine, images: Images
) -> None:
    image = images.large_too
    async with (
        open_client(machine.address) as client,
        client.stream(requests.Pull(image=image.reference)) as answers,
    ):
        async for answer in answers:
            assert isinstance(answer, responses.Progress)
            break
    async with open_client(machine.address) as client:
        assert (await pull(client, image.reference))["digest"] == image.config_digest
        assert (await run(client, image.reference, "ls", "/noise")).exit_code == 0
    assert wrong_blobs(machine.storage) == []


async def test_two_pulls_of_one_image_at_once_both_succeed(
    registry: LocalRegistry, machine: Machine, images: Images
) -> None:
    image = images.variant("twice", {"Cmd": ["true"]}, images.noise_layer("twice"))
    infos = []

    async def pull_it() -> None:
        async with open_client(machine.address) as client:
            infos.append(await pull(client, image.reference))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull_it)
        nursery.start_soon(pull_it)
    assert infos[0] == infos[1]
    layer = f"GET /v2/twice/blobs/{image.layers[-1]} "
    assert sum(layer in request for request in fetched(registry)) == 1


async def test_nothing_of_a_pull_runs_on_after_it(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    await pull(client, images.whiteouts.reference)
    processes = (await execute(client, "ps")).stdout.decode()
    assert "mkfs" not in processes


def fetched(registry: LocalRegistry) -> list[str]:
    """The registry's log lines of what agents asked for; skopeo's own are not among them."""
    lines = registry.access_log.read_text().splitlines()
    return [line for line in lines if line.endswith('"innkeep"')]


def forget_peak(pid: int) -> None:
    """proc_pid_clear_refs(5)"""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had resident since then."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kib) << 10
