"""Commands in containers: crun, the image's configuration, isolation."""

import time

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import lifeline, pull, refusal, run, shell
from tests.support.images import Images
from tests.support.machine import Machine
from tests.support.watch import until


@pytest.fixture
async def busybox(client: AgentClient, images: Images) -> str:
    """The reference of an image in the machine's store."""
    await pull(client, images.busybox.reference)
    return images.busybox.reference


@pytest.fixture
async def configured(client: AgentClient, images: Images) -> str:
    await pull(client, images.configured.reference)
    return images.configured.reference


async def test_status_output_and_error_output_come_back(client: AgentClient, busybox: str) -> None:
    done = await run(client, busybox, "sh", "-c", "echo out; echo err >&2; exit 42")
    assert done == responses.Completed(exit_code=42, stdout=b"out\n", stderr=b"err\n")


async def test_death_by_a_signal_is_128_and_its_number(client: AgentClient, busybox: str) -> None:
    done = await run(client, busybox, "sh", "-c", "sh -c 'kill -KILL $$'; exit $?")
    assert done.exit_code == 137


async def test_the_images_entrypoint_and_cmd_run_when_no_command_is_given(
    client: AgentClient, configured: str
) -> None:
    done = await run(client, configured)
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "default arguments"
    assert _ids(lines[1]) == _ids("uid=1000(guest) gid=1000(guest) groups=1000(guest),10(wheel)")
    assert lines[2] == "/home/guest"
    assert "FROM_IMAGE=image" in lines
    assert "HOME=/home/guest" in lines
    assert "PATH=/bin:/usr/bin" in lines


async def test_a_command_takes_the_place_of_entrypoint_and_cmd(
    client: AgentClient, configured: str
) -> None:
    done = await run(client, configured, "echo", "mine")
    assert done.stdout == b"mine\n"


async def test_the_requests_environment_adds_to_the_images_one_entry_a_name(
    client: AgentClient, configured: str
) -> None:
    env = (("OVERRIDDEN", "request"), ("NEW", "1"), ("NEW", "2"), ("SPACES", " a  b "))
    done = await run(client, configured, "env", env=env)
    lines = done.stdout.decode().splitlines()
    names = [line.partition("=")[0] for line in lines]
    assert len(names) == len(set(names))
    assert {"FROM_IMAGE=image", "OVERRIDDEN=request", "NEW=2", "SPACES= a  b "} <= set(lines)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("root", "uid=0(root) gid=0(root) groups=0(root),10(wheel)"),
        ("guest", "uid=1000(guest) gid=1000(guest) groups=1000(guest),10(wheel)"),
        ("1000", "uid=1000(guest) gid=1000(guest) groups=1000(guest),10(wheel)"),
        ("guest:wheel", "uid=1000(guest) gid=10(wheel) groups=10(wheel)"),
        ("4242:77", "uid=4242 gid=77 groups=77"),
        ("4242", "uid=4242 gid=0(root) groups=0(root)"),
    ],
)
async def test_a_user_is_looked_up_in_the_images_own_files(
    client: AgentClient, busybox: str, user: str, expected: str
) -> None:
    done = await run(client, busybox, "id", user=user)
    assert _ids(done.stdout.decode()) == _ids(expected)


async def test_an_unknown_user_is_an_error_that_names_it(client: AgentClient, busybox: str) -> None:
    error = await refusal(client, requests.Run(image=busybox, command=("id",), user="nobody-here"))
    assert "nobody-here" in error.message


async def test_the_working_directory_is_the_requests_or_the_images(
    client: AgentClient, configured: str
) -> None:
    assert (await run(client, configured, "pwd")).stdout == b"/home/guest\n"
    assert (await run(client, configured, "pwd", workdir="/etc")).stdout == b"/etc\n"


async def test_no_command_at_all_is_said_in_the_words_that_hosts_know(
    client: AgentClient, images: Images
) -> None:
    reference = images.silent.reference
    await pull(client, reference)
    error = await refusal(client, requests.Run(image=reference, command=()))
    assert error.code == "INVALID_REQUEST"
    assert error.message == (
        f"no command given and image '{reference}' defines no entrypoint or cmd"
    )


async def test_an_image_without_a_path_has_dockers(client: AgentClient, images: Images) -> None:
    await pull(client, images.silent.reference)
    done = await run(client, images.silent.reference, "env")
    environment = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert environment["PATH"] == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert environment["HOME"] == "/root"
    assert "TERM" in environment


@pytest.mark.parametrize(
    ("command", "cause"),
    [("no-such-program", "not found"), ("/no/such", "not found"), ("/etc/passwd", "execut")],
)
async def test_what_cannot_be_started_is_an_error_with_the_cause(
    client: AgentClient, busybox: str, command: str, cause: str
) -> None:
    error = await refusal(client, requests.Run(image=busybox, command=(command,)))
    assert error.code == "RUN_FAILED"
    assert command in error.message
    assert cause in error.message.lower()


async def test_each_run_has_a_fresh_root_that_is_gone_afterwards(
    client: AgentClient, busybox: str
) -> None:
    overlays = await shell(client, "ls /storage/overlays")
    done = await run(client, busybox, "sh", "-c", "echo changed >/etc/passwd; touch /new; ls /new")
    assert done.stdout == b"/new\n"
    done = await run(client, busybox, "sh", "-c", "ls /new; head -n 1 /etc/passwd")
    assert done.stdout == b"root:x:0:0:root:/root:/bin/sh\n"
    assert await shell(client, "ls /storage/overlays") == overlays


async def test_the_container_has_namespaces_of_its_own_and_the_machines_network(
    client: AgentClient, busybox: str
) -> None:
    script = "cd /proc/self/ns; for n in pid mnt ipc uts cgroup net user; do readlink $n; done"
    inside = (await run(client, busybox, "sh", "-c", script)).stdout.decode().split()
    outside = (await shell(client, script)).split()
    shared = [name.partition(":")[0] for name in inside if name in outside]
    assert len(inside) == len(outside) == 7
    assert shared == ["net", "user"]
    processes = await run(client, busybox, "sh", "-c", "ls -d /proc/[0-9]* | wc -l")
    assert int(processes.stdout) <= 4


async def test_root_in_a_container_has_dockers_default_capabilities(
    client: AgentClient, busybox: str
) -> None:
    done = await run(client, busybox, "grep", "^CapEff", "/proc/self/status")
    assert done.stdout.split()[1] == b"00000000a80425fb"
    refused = await run(client, busybox, "mount", "-t", "tmpfs", "none", "/tmp")
    assert refused.exit_code != 0
    hidden = await run(client, busybox, "sh", "-c", "cat /proc/kcore /proc/keys; ls /proc/scsi")
    assert hidden.stdout == b""


async def test_the_kernels_command_line_is_masked(client: AgentClient, busybox: str) -> None:
    done = await run(client, busybox, "cat", "/proc/cmdline")
    assert b"innkeep" not in done.stdout
    assert b"console" not in done.stdout


async def test_the_usual_devices_and_files_are_there(client: AgentClient, busybox: str) -> None:
    script = (
        "echo x >/dev/null && head -c 1 /dev/urandom >/dev/null && test -d /dev/shm && "
        "test -c /dev/tty && test -L /dev/fd && test -s /etc/hosts && test -e /etc/resolv.conf "
        '&& hostname | grep -q . && grep -q "$(hostname)" /etc/hosts && echo all'
    )
    done = await run(client, busybox, "sh", "-c", script)
    assert (done.stdout, done.stderr) == (b"all\n", b"")


async def test_what_the_machine_shares_is_the_workspace(client: AgentClient, busybox: str) -> None:
    await shell(client, "echo from the machine >/workspace/note")
    done = await run(client, busybox, "sh", "-c", "cat /workspace/note; echo back >/workspace/note")
    assert done.stdout == b"from the machine\n"
    assert await shell(client, "cat /storage/workspace/note; rm /workspace/note") == "back\n"


async def test_a_time_limit_ends_the_container_with_124(machine: Machine, busybox: str) -> None:
    async with (
        lifeline(machine.address, "/storage/workspace", "/workspace") as line,
        open_client(machine.address) as client,
    ):
        script = line.script("echo so far; (setsid sleep 1000 &) ; sleep 1000")
        done = await run(client, busybox, "sh", "-c", script, timeout_ms=1500)
        assert (done.exit_code, done.stdout) == (124, b"so far\n")
        with trio.fail_after(5):
            await line.ended()


async def test_hanging_up_ends_the_container_and_removes_its_overlay(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    overlays = machine.storage / "overlays"
    mounts = await shell(client, "wc -l </proc/self/mountinfo")
    before = set(overlays.iterdir())
    async with lifeline(machine.address, "/storage/workspace", "/workspace") as line:
        async with open_client(machine.address) as other:
            script = line.script("(setsid sleep 1000 &) ; sleep 1000")
            await other.send(requests.Run(image=busybox, command=("sh", "-c", script)))
            await line.started()
        with trio.fail_after(5):
            await line.ended()
    await until(lambda: set(overlays.iterdir()) == before, overlays)
    assert await shell(client, "wc -l </proc/self/mountinfo") == mounts


async def test_more_output_than_any_pipe_holds_is_complete(
    client: AgentClient, busybox: str
) -> None:
    done = await run(client, busybox, "head", "-c", "8000000", "/dev/zero")
    assert done.stdout == bytes(8_000_000)


async def test_stdin_is_empty(client: AgentClient, busybox: str) -> None:
    assert (await run(client, busybox, "cat")).stdout == b""


async def test_containers_run_at_once(machine: Machine, busybox: str) -> None:
    begun = time.monotonic()
    async with trio.open_nursery() as nursery:

        async def sleep() -> None:
            async with open_client(machine.address) as client:
                assert (await run(client, busybox, "sleep", "1")).exit_code == 0

        for _ in range(8):
            nursery.start_soon(sleep)
    assert time.monotonic() - begun < 6


async def test_nothing_of_many_runs_stays_behind(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    async def left() -> tuple[str, ...]:
        return (
            await shell(client, "find /sys/fs/cgroup -type d | wc -l"),
            await shell(client, "wc -l </proc/self/mountinfo"),
            await shell(client, "ls /storage/overlays"),
            await shell(client, "find /run/innkeep | wc -l"),
            await shell(client, "ls -d /proc/[0-9]* | wc -l"),
        )

    await run(client, busybox, "true")
    before, files = await left(), machine.agents_open_files()
    for _ in range(20):
        await run(client, busybox, "sh", "-c", "sleep 100 & exit 1")
    assert await left() == before
    assert machine.agents_open_files() <= files + 2


async def test_whiteouts_hold_in_the_container(client: AgentClient, images: Images) -> None:
    await pull(client, images.whiteouts.reference)
    script = "ls /gone /kept /opaque; cat /replaced /turns-into-directory/inside; ls /link"
    done = await run(client, images.whiteouts.reference, "sh", "-c", script)
    assert done.stdout.decode().split("\n")[:4] == ["/gone:", "new", "", "/kept:"]
    assert b"only this" not in done.stdout
    assert b"a file now\na directory now\n" in done.stdout
    assert b"/link" in done.stderr


def _ids(line: str) -> tuple[str, str, frozenset[str]]:
    """What `id` prints; busybox leaves the groups out where there is only the first."""
    words = dict(word.split("=", 1) for word in line.split())
    groups = words.get("groups", words["gid"])
    return words["uid"], words["gid"], frozenset(groups.split(","))
