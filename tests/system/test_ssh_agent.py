"""The host's SSH agent in the machine and in its containers, asked by OpenSSH's own client."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen

from initramfs.local_registry import LocalRegistry
from protocol import requests
from protocol.client import AgentClient, open_client
from protocol.constants import Port
from protocol.values import Mount
from tests.support.crash import kill_agent
from tests.support.execution import execute, pull, run, shell
from tests.support.host_ports import HostPorts
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.ssh import ssh_agent
from tests.support.standing import Persistent, persistent_overlay, whole_output

SOCKET = "/tmp/ssh-agent.sock"
LIST = "ssh-add -l"


@frozen
class Forwarding:
    """A machine with the host's agent, whose one key `ssh-add -l` prints as `key`."""

    machine: Machine
    key: str


@pytest.fixture(scope="module")
def forwarding(
    registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Forwarding]:
    directory = tmp_path_factory.mktemp("forwarding")
    with (
        ssh_agent(directory / "agent.sock", directory) as key,
        booted(
            directory,
            insecure_registries=[registry.address],
            options=["--append=innkeep.ssh_agent=1"],
        ) as machine,
    ):
        yield Forwarding(machine, key)


@pytest.fixture
async def talk(forwarding: Forwarding) -> AsyncIterator[AgentClient]:
    async with open_client(forwarding.machine.address) as client:
        yield client


@pytest.fixture
async def image(talk: AgentClient, images: Images) -> str:
    await pull(talk, images.clients.reference)
    return images.clients.reference


@pytest.fixture
async def overlay(forwarding: Forwarding, image: str) -> AsyncIterator[Persistent]:
    async with persistent_overlay(forwarding.machine, image) as persistent:
        yield persistent


def variable(environment: bytes) -> list[str]:
    """The entries of SSH_AUTH_SOCK in what `env` prints."""
    lines = environment.decode().splitlines()
    return [line for line in lines if line.startswith("SSH_AUTH_SOCK=")]


# In the machine itself


async def test_commands_in_the_machine_are_told_of_the_socket(talk: AgentClient) -> None:
    assert variable((await execute(talk, "env")).stdout) == [f"SSH_AUTH_SOCK={SOCKET}"]
    assert await shell(talk, f"stat -c %F {SOCKET}") == "socket\n"


async def test_a_request_may_name_another_socket(talk: AgentClient) -> None:
    env = (("SSH_AUTH_SOCK", "/mine"),)
    assert variable((await execute(talk, "env", env=env)).stdout) == ["SSH_AUTH_SOCK=/mine"]


async def test_without_forwarding_nothing_is_there(client: AgentClient, images: Images) -> None:
    assert variable((await execute(client, "env")).stdout) == []
    await pull(client, images.busybox.reference)
    done = await run(client, images.busybox.reference, "sh", "-c", "env; ls /tmp")
    assert variable(done.stdout) == []
    assert "ssh-agent.sock" not in done.stdout.decode().splitlines()
    assert "ssh-agent.sock" not in (await shell(client, "ls /tmp")).splitlines()


# In containers


async def test_the_hosts_keys_are_listed_in_a_container(
    talk: AgentClient, image: str, forwarding: Forwarding
) -> None:
    done = await run(talk, image, "sh", "-c", LIST)
    assert (done.exit_code, done.stdout.decode(), done.stderr) == (0, forwarding.key, b"")


@pytest.mark.parametrize("mode", ["first", "joined", "detached", "background"])
async def test_the_hosts_keys_are_listed_in_a_container_that_stays(
    overlay: Persistent, forwarding: Forwarding, mode: str
) -> None:
    if mode == "joined":
        await overlay.run("true")
    if mode in ("first", "joined"):
        assert await overlay.shell(LIST) == forwarding.key
        return
    name = await (overlay.detach(LIST) if mode == "detached" else overlay.background(LIST))
    assert (await whole_output(forwarding.machine, name)).decode() == forwarding.key


async def test_a_whole_machine_container_has_them_too(
    talk: AgentClient, image: str, forwarding: Forwarding
) -> None:
    done = await run(talk, image, "sh", "-c", LIST, unprivileged=False)
    assert done.stdout.decode() == forwarding.key


async def test_any_user_of_a_container_has_them(
    talk: AgentClient, image: str, forwarding: Forwarding
) -> None:
    for user in ("guest", "4242:77"):
        assert (await run(talk, image, "sh", "-c", LIST, user=user)).stdout.decode() == (
            forwarding.key
        )


async def test_an_image_without_tmp_gets_the_socket_all_the_same(
    talk: AgentClient, images: Images
) -> None:
    await pull(talk, images.bare.reference)
    for fields in ({}, {"persistent_overlay_id": "bare"}):
        script = f'busybox stat -c %F {SOCKET}; echo "$SSH_AUTH_SOCK"'
        done = await run(talk, images.bare.reference, "busybox", "sh", "-c", script, **fields)
        assert done.stdout.decode() == f"socket\n{SOCKET}\n", done


async def test_the_images_own_variable_stays_and_a_requests_wins(
    talk: AgentClient, images: Images
) -> None:
    config = {"Env": ["PATH=/bin", "SSH_AUTH_SOCK=/of/image"], "Cmd": ["env"]}
    reference = images.variant("ssh-configured", config).reference
    await pull(talk, reference)
    assert variable((await run(talk, reference)).stdout) == ["SSH_AUTH_SOCK=/of/image"]
    env = (("SSH_AUTH_SOCK", "/mine"),)
    assert variable((await run(talk, reference, env=env)).stdout) == ["SSH_AUTH_SOCK=/mine"]


@pytest.mark.parametrize("mode", ["alone", "first", "joined"])
async def test_a_mount_over_tmp_is_the_requests_and_no_reason_to_fail(
    overlay: Persistent, forwarding: Forwarding, mode: str
) -> None:
    here = forwarding.machine.storage / "workspace" / overlay.id
    here.mkdir()
    (here / "file").write_text("mine\n")
    inside = f"/workspace/{overlay.id}"
    fields: dict[str, Any] = {"persistent_overlay_id": None if mode == "alone" else overlay.id}
    if mode == "joined":
        await overlay.run("true")
    mount = Mount(inside, "/tmp", read_only=True)
    script = "cat /tmp/file; ls /tmp"
    assert await overlay.shell(script, mounts=(mount,), **fields) == "mine\nfile\n"
    if mode != "alone":
        # Whoever joins does not need to be told of it.
        assert await overlay.shell("ls /tmp") == "file\n"


async def test_a_mount_over_tmp_that_can_be_written_to_has_the_socket_in_it(
    overlay: Persistent, forwarding: Forwarding
) -> None:
    (forwarding.machine.storage / "workspace" / overlay.id).mkdir()
    mount = Mount(f"/workspace/{overlay.id}", "/tmp", read_only=False)
    assert await overlay.shell(LIST, mounts=(mount,)) == forwarding.key


# The host's side


async def test_without_an_agent_on_the_host_a_client_is_told_at_once(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    with booted(
        tmp_path,
        insecure_registries=[registry.address],
        options=["--append=innkeep.ssh_agent=1"],
    ) as machine:
        async with open_client(machine.address) as client:
            await pull(client, images.clients.reference)
            done = await run(client, images.clients.reference, "sh", "-c", LIST)
            assert done.exit_code != 0
            assert done.stdout == b""
            # One that comes later is found.
            ports = HostPorts(tmp_path / "agent.sock")
            async with ports.listening(Port.SSH_AGENT) as listener, trio.open_nursery() as nursery:
                request = requests.Run(image=images.clients.reference, command=("sh", "-c", LIST))
                nursery.start_soon(client.request, request)
                async with await listener.accept() as agent:
                    # SSH2_AGENTC_REQUEST_IDENTITIES, draft-ietf-sshm-ssh-agent.
                    asked = b""
                    while len(asked) < 5:
                        asked += await agent.receive_some()
                    assert asked == b"\0\0\0\1\x0b"


# The agent's death


async def test_the_socket_is_there_again_after_the_agents_death(
    forwarding: Forwarding, image: str
) -> None:
    machine = forwarding.machine
    async with open_client(machine.address) as client:
        overlay = Persistent(machine, client, image, "survives")
        await overlay.run("mkfifo", "/go")
        # Who is there before, and asks when nobody has joined since.
        pid = await overlay.background(f"read word </go; {LIST}")
    await kill_agent(machine)
    async with open_client(machine.address) as client:
        overlay = overlay.over(client)
        await shell(client, f"echo >/storage/overlays/{overlay.workload}/merged/go")
        assert (await whole_output(machine, pid)).decode() == forwarding.key
        # Who comes after; it is mounted once, as before.
        script = f"{LIST}; grep -c ' {SOCKET} ' /proc/self/mountinfo"
        assert await overlay.shell(script) == f"{forwarding.key}1\n"
        assert await shell(client, "ls /tmp") == "ssh-agent.sock\n"
        await overlay.end()
        await overlay.cleanup()
