"""The workload protocol against the whole image: in the machine itself, and in a container."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol.client import AuthenticationFailed, open_client
from tests.support.chance import chance
from tests.support.crash import kill_agent, successor
from tests.support.directory_events import on_each_event
from tests.support.execution import pull, shell
from tests.support.images import Images
from tests.support.machine import PROJECT, Machine, booted
from tests.support.rounds import rounds
from tests.support.standing import Persistent
from tests.support.workload import TOKEN, Peer, open_log, open_peer

OVERLAY = "served"


def with_token(directory: Path) -> str:
    file = directory / "token"
    file.write_text(f"{TOKEN}\n")
    return f"--token-file={file}"


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose commands run in itself."""
    directory = tmp_path_factory.mktemp("machine")
    with booted(directory, options=[with_token(directory)]) as machine:
        yield machine


@pytest.fixture(scope="module")
def containers(
    registry: LocalRegistry, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """One whose commands run in the container of an image, which it does not have at first; its
    workload is tried until then."""
    directory = tmp_path_factory.mktemp("machine")
    words = {
        "image": images.busybox.reference,
        "overlay": OVERLAY,
        "command": "sh,-c,echo%20begun;exec%20sleep%201000",
        "restart": "on-failure",
    }
    options = [f"--append=innkeep.workload.{key}={value}" for key, value in words.items()]
    with booted(
        directory,
        insecure_registries=[registry.address],
        options=[with_token(directory), *options],
    ) as machine:
        yield machine


async def test_commands_run_in_the_machine_and_end_with_their_connection(vm: Machine) -> None:
    async with open_peer(vm.address) as peer:
        await peer.shell(1, "cat /etc/hostname; id -u; echo err >&2; exit 3")
        told = await peer.over(1)
        assert (told.stdout, told.stderr, told.exit) == (b"innkeep\n0\n", b"err\n", (3, "exited"))
        await peer.shell(2, "stty size", tty=True)
        assert (await peer.over(2)).stdout == b"24 80\r\n"
        await peer.exec(3, "sleep", "1000")
        await peer.signal(3, signal.SIGKILL)
        assert (await peer.over(3)).exit == (137, "signaled: SIGKILL")


async def test_the_workload_survives_the_agents_death_and_its_log_goes_on(vm: Machine) -> None:
    script = (
        # Open for both ways: a reader alone would meet the end of the file after any writer's.
        "mkfifo /tmp/f; exec 3<>/tmp/f; trap 'exit 9' USR1; echo one; "
        "while read line <&3; do echo $line; done"
    )
    async with open_peer(vm.address) as peer, open_client(vm.address) as client:
        await peer.run(1, "/bin/sh", "-c", script)
        await peer.output(1, b"one\n")
        await kill_agent(vm)
        assert await peer.closed()
    for word in (b"two", b"three"):
        async with open_client(vm.address) as client, open_log(vm.address) as log:
            await shell(client, f"echo {word.decode()} >/tmp/f")
            told = await log.output(0, word + b"\n")
            if word == b"two":
                assert told.stdout == b"one\ntwo\n"
                await kill_agent(vm)
                continue
            assert told.stdout == b"one\ntwo\nthree\n"
    async with open_peer(vm.address) as peer:
        await peer.run(1, "true")
        assert "one at a time" in str((await peer.over(1)).error)
        await peer.signal(0, signal.SIGUSR1)
        await freed(peer)


async def test_without_a_command_at_boot_a_host_may_use_the_id_0(vm: Machine) -> None:
    async with open_peer(vm.address) as peer:
        await peer.run(0, "echo", "hello")
        told = await peer.over(0)
        assert (told.stdout, told.exit) == (b"hello\n", (0, "exited"))
        await peer.run(1, "env")
        await peer.exec(2, "env")
        environment = (await peer.over(1)).stdout.splitlines()
        assert sorted(environment) == sorted((await peer.over(2)).stdout.splitlines())


async def test_the_workload_of_an_image_starts_once_that_is_there_and_survives_the_agent(
    containers: Machine, images: Images
) -> None:
    async with open_peer(containers.address) as peer, open_client(containers.address) as client:
        await peer.until(lambda: peer.told(0).exit is not None)
        code, reason = peer.told(0).exit or (0, "")
        assert code == 127
        assert reason.startswith("failed to start: image not found")
        await pull(client, images.busybox.reference)
        async with open_log(containers.address) as log:
            await log.output(0, b"begun\n")
        await kill_agent(containers)
    async with open_peer(containers.address) as peer, open_log(containers.address) as log:
        await log.output(0, b"begun\n")
        assert log.told(0).stdout == b"begun\n"
        await peer.signal(0, signal.SIGTERM)
        # PID 2 and more: the container's first process is the agent's own.
        await peer.until(lambda: peer.told(0).exit == (143, "signaled: SIGTERM"))
        await log.until(lambda: log.told(0).stdout == b"begun\nbegun\n")


async def test_an_agent_that_is_killed_while_a_container_is_joined_has_that_done_once(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    words = {
        "image": images.busybox.reference,
        "command": "sh,-c,echo%20begun;exec%20sleep%201000",
        "restart": "always",
    }
    options = [f"--append=innkeep.workload.{key}={value}" for key, value in words.items()]
    chances = chance("join")
    with booted(
        tmp_path,
        insecure_registries=[registry.address],
        options=[with_token(tmp_path), *options],
    ) as machine:
        async with open_client(machine.address) as client, open_log(machine.address) as log:
            await pull(client, images.busybox.reference)
            await log.output(0, b"begun\n")
        # As many as init lets an agent die within a minute.
        for trial in range(1, rounds(2, 5) + 1):
            # The end of one run is put down, then there is a shell for the next, then its command.
            deadly = chances.randrange(1, 10)
            print(f"trial {trial}: event {deadly}")
            pid, serving = machine.agent_pid(), successor(machine)

            def on_event(count: int, pid: int = pid, deadly: int = deadly) -> None:
                if count == deadly:
                    os.kill(pid, signal.SIGKILL)

            records = machine.path("/run/innkeep/workload")
            async with open_peer(machine.address) as peer:
                with on_each_event([records], on_event):
                    await peer.signal(0, signal.SIGTERM)
                    assert await peer.closed()
            await serving()
            async with open_peer(machine.address) as peer, open_log(machine.address) as log:
                begun = b"begun\n" * (trial + 1)
                await log.output(0, begun)
                await peer.shell(1, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
                told = await peer.over(1)
                assert told.stdout.count(b"sleep 1000") == 1
                assert log.told(0).stdout == begun


async def test_exec_joins_the_container_of_the_overlay(containers: Machine, images: Images) -> None:
    async with open_peer(containers.address) as peer, open_client(containers.address) as client:
        await pull(client, images.busybox.reference)
        await peer.shell(1, "echo mine >/mark; hostname; echo $PATH; exit 4")
        told = await peer.over(1)
        assert told.exit == (4, "exited")
        same = Persistent(containers, client, images.busybox.reference, OVERLAY)
        assert await same.shell("cat /mark") == "mine\n"
        await peer.shell(2, "test -t 1 && echo terminal", tty=True)
        assert (await peer.over(2)).stdout == b"terminal\r\n"
        await peer.shell(
            3, "trap 'echo got it; exit 5' USR1; echo on; while :; do sleep 0.01; done"
        )
        await peer.output(3, b"on")
        await peer.signal(3, signal.SIGUSR1)
        told = await peer.over(3)
        assert told.stdout.endswith(b"got it\n")
        assert told.exit == (5, "exited")
        await peer.exec(4, "no-such-program")
        assert str((await peer.over(4)).exit).startswith("(127, 'failed to start: ")
        await peer.exec(5)
        await peer.over(5)
        await peer.shell(6, "trap 'exit 6' TERM; echo on; while :; do sleep 0.01; done")
        await peer.output(6, b"on")
        await peer.stop(10_000)
        assert (await peer.over(6)).exit == (6, "stopped")
        await freed(peer)


async def test_the_token_is_on_no_console_and_in_no_container(
    containers: Machine, images: Images
) -> None:
    async with open_peer(containers.address) as peer, open_client(containers.address) as client:
        await pull(client, images.busybox.reference)
        await peer.shell(1, "grep -r . /etc/innkeep /sys/firmware /proc/cmdline; env; true")
        told = await peer.over(1)
    assert TOKEN.encode() not in told.stdout + told.stderr
    assert TOKEN not in containers.console_text()
    agent = Path(f"/proc/{containers.agent_pid()}")
    assert TOKEN.encode() not in (agent / "environ").read_bytes() + (agent / "cmdline").read_bytes()
    kept = containers.path("/etc/innkeep/token")
    assert oct(kept.stat().st_mode & 0o777) == oct(0o600)


async def test_a_client_made_from_the_documents_alone_in_another_language_is_understood(
    vm: Machine,
) -> None:
    socket = vm.address.removeprefix("unix:")
    result = await trio.run_process(
        ["perl", PROJECT / "tests/support/client.pl", socket, TOKEN],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode().replace("\r", "").splitlines() == [
        "exec: out",
        "3 exited",
        "tty: 24 80",
        "0 exited",
        "signal: 143 signaled: SIGTERM",
        "nobody: error: signal: no command has the request_id 99",
        "second: error: the workload runs already: there is one at a time",
        "log: hello /tmp",
        "stop: hello /tmp",
        "143 stopped",
        "wrong: auth_failed",
        "ping: 1",
        "vm_exec: plain",
        "started",
        "cat: typed",
        "exited: 0",
    ]


async def test_without_a_token_a_machine_lets_nobody_in(machine: Machine) -> None:
    with pytest.raises(AuthenticationFailed):
        async with open_peer(machine.address):
            pass


async def test_at_rest_the_ports_take_no_processor_time(vm: Machine) -> None:
    async with open_peer(vm.address) as peer, open_log(vm.address):
        await peer.run(1, "sleep", "1000")
        await peer.until(lambda: peer.told(1).started)
        before = vm.agents_cpu_s()
        await trio.sleep(2)
        assert vm.agents_cpu_s() - before <= 1 / os.sysconf("SC_CLK_TCK")
        await peer.signal(1, signal.SIGKILL)
        await peer.over(1)


async def freed(peer: Peer, number: int = 100) -> None:
    """Wait until a workload may be started; asking before is an error and no more."""
    while True:
        number += 1
        await peer.run(number, "true")
        if (await peer.over(number)).exit is not None:
            return
