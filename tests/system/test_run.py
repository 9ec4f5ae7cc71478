"""Commands in containers: crun, the image's configuration, isolation."""

import time
from typing import Any

import pytest
import trio
from attrs import frozen

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import lifeline, pull, refusal, run, shell
from tests.support.images import Images
from tests.support.machine import Machine
from tests.support.standing import Persistent, whole_output
from tests.support.watch import until

STREAM_LIMIT = 11 * 1024 * 1024


@frozen
class Prepared:
    """Where commands run that a script prepares."""

    overlay: Persistent
    overlay_id: str | None

    async def run(self, script: str | None, *command: str, **fields: Any) -> responses.Completed:
        fields = {"remote_volume_mount": script, "persistent_overlay_id": self.overlay_id, **fields}
        return await self.overlay.run(*command, **fields)


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


# Sentences about running processes that hold in containers too


async def test_an_image_that_is_not_here_is_not_found(client: AgentClient) -> None:
    error = await refusal(client, requests.Run(image="localhost:1/absent", command=("true",)))
    assert error.code == "NOT_FOUND"
    assert "localhost:1/absent" in error.message


async def test_an_image_is_found_by_any_spelling_of_it(client: AgentClient, busybox: str) -> None:
    repository, _, tag = busybox.rpartition(":")
    digest = (await pull(client, busybox))["reference"]
    for spelling in (busybox, digest, f"{repository}:{tag}"):
        assert (await run(client, spelling, "echo", "found")).stdout == b"found\n"


async def test_the_requests_input_is_all_of_it(client: AgentClient, busybox: str) -> None:
    text = "größe\n" * 100_000
    done = await run(client, busybox, "cat", stdin_data=text)
    assert done.stdout.decode() == text
    assert (await run(client, busybox, "cat", stdin_data="")).stdout == b""


async def test_arguments_arrive_as_they_are(client: AgentClient, busybox: str) -> None:
    words = ("$HOME", "a b", "*", "", "größe", "new\nline", "'\"")
    done = await run(client, busybox, "printf", "<%s>", *words)
    assert done.stdout.decode() == "".join(f"<{word}>" for word in words)


async def test_a_time_limit_of_nothing_ends_at_once(client: AgentClient, busybox: str) -> None:
    with trio.fail_after(10):
        done = await run(client, busybox, "sleep", "1000", timeout_ms=0)
    assert (done.exit_code, done.timed_out) == (124, True)


async def test_a_time_limit_that_is_kept_changes_nothing(client: AgentClient, busybox: str) -> None:
    assert (await run(client, busybox, "sh", "-c", "exit 3", timeout_ms=60_000)).exit_code == 3


async def test_output_beyond_a_frame_keeps_its_head_and_says_so(
    client: AgentClient, busybox: str
) -> None:
    script = f"head -c {STREAM_LIMIT} /dev/zero; echo beyond; head -c 9000000 /dev/zero; exit 7"
    done = await run(client, busybox, "sh", "-c", script)
    assert (done.exit_code, len(done.stdout)) == (7, STREAM_LIMIT)
    assert (done.stdout_truncated, done.stderr_truncated) == (True, False)
    assert b"truncated" in done.stderr


async def test_signals_have_their_default_effect(client: AgentClient, busybox: str) -> None:
    with trio.fail_after(10):
        done = await run(client, busybox, "sh", "-c", "yes | head -n 1")
    assert done.stdout == b"y\n"
    status = await run(client, busybox, "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    assert set(status.stdout.split()[1::2]) == {b"0" * 16}


async def test_no_descriptor_of_the_agents_is_in_a_container(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    async with open_client(machine.address) as other:
        await shell(other, "true")
        done = await run(client, busybox, "ls", "/proc/self/fd")
    # 0, 1 and 2, and the directory that ls itself reads.
    assert done.stdout == b"0\n1\n2\n3\n"


async def test_what_a_command_leaves_behind_ends_with_its_container_and_delays_nothing(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    async with lifeline(machine.address, "/storage/workspace", "/workspace") as line:
        begun = time.monotonic()
        script = line.script("(setsid sh -c 'trap : TERM HUP; sleep 1000' &); echo done")
        done = await run(client, busybox, "sh", "-c", script)
        assert (done.exit_code, done.stdout) == (0, b"done\n")
        assert time.monotonic() - begun < 5
        await line.ended()


# A shell script that comes before the command, for what hosts mount by their own tools


@pytest.fixture(params=["ephemeral", "first", "joined"])
async def prepared(request: pytest.FixtureRequest, persistent: Persistent) -> Prepared:
    """Runs commands with a `remote_volume_mount`, in a new container or in one that runs."""
    if request.param == "joined":
        await persistent.run("true")
    return Prepared(persistent, None if request.param == "ephemeral" else persistent.id)


async def test_the_script_runs_before_the_command_and_in_its_place(prepared: Prepared) -> None:
    script = "echo from the script; export EXPORTED='a b'; echo file >/tmp/file; cd /etc"
    then = 'echo "$EXPORTED" $GREETER; cat /tmp/file; pwd; id -un'
    done = await prepared.run(script, "sh", "-c", then, user="guest")
    assert done.exit_code == 0
    assert done.stdout == b"from the script\na b busybox\nfile\n/etc\nguest\n"


async def test_its_mounts_are_seen_by_the_command(prepared: Prepared) -> None:
    script = "mkdir -p /volume && mount -t tmpfs none /volume && echo remote >/volume/file"
    done = await prepared.run(script, "cat", "/volume/file", unprivileged=False)
    assert (done.exit_code, done.stdout) == (0, b"remote\n")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("false", 1),
        ("exit 42", 42),
        ("true\nexit 43 # why", 43),
        ("set -e\nfalse\ntrue", 1),
        ("no-such-mounter", 127),
        ("true; (exit 44)\n\n", 44),
        ("echo 'unfinished", 2),
    ],
)
async def test_where_it_fails_the_command_does_not_run_and_its_status_is_the_answer(
    prepared: Prepared, script: str, code: int
) -> None:
    done = await prepared.run(script, "touch", "/workspace/should-not-be")
    assert done.exit_code == code
    assert not (prepared.overlay.machine.storage / "workspace" / "should-not-be").exists()


@pytest.mark.parametrize(
    "script",
    [
        "echo mounted",
        "echo mounted\n",
        "echo mounted\n\n  \n",
        "echo mounted # with care",
        "# first\necho mounted\n# last",
        "cat <<END\nmounted\nEND",
        "cat <<END\nmounted\nEND\n",
        "if true; then\n  echo mounted\nfi",
        "false || echo mounted",
        "echo mounted;",
        "echo mounted &\nwait",
        "set -eu\necho mounted",
    ],
)
async def test_however_it_is_written_the_command_follows(prepared: Prepared, script: str) -> None:
    done = await prepared.run(script, "echo", "then")
    assert (done.exit_code, done.stdout, done.stderr) == (0, b"mounted\nthen\n", b"")


async def test_an_empty_script_changes_nothing(prepared: Prepared) -> None:
    for script in ("", "\n", "# nothing", None):
        done = await prepared.run(script, "echo", "then")
        assert (done.exit_code, done.stdout, done.stderr) == (0, b"then\n", b"")


async def test_the_commands_arguments_are_untouched_by_it(prepared: Prepared) -> None:
    words = ("$HOME", "a b", "*", "", "größe", "new\nline", "'\"", "`id`", "\\")
    done = await prepared.run("set -- other words", "printf", "<%s>", *words)
    assert done.stdout.decode() == "".join(f"<{word}>" for word in words)


async def test_the_images_own_command_follows_it_where_none_is_given(prepared: Prepared) -> None:
    done = await prepared.run("GREETER=script")
    assert (done.exit_code, done.stdout) == (0, b"hello from script\n")


async def test_the_commands_exit_code_input_and_signals_are_its_own(prepared: Prepared) -> None:
    done = await prepared.run("true", "sh", "-c", "cat; exit 9", stdin_data="input")
    assert (done.exit_code, done.stdout) == (9, b"input")
    # Nothing stands between: the shell has become the command.
    assert (await prepared.run("true", "sh", "-c", "kill -TERM $$; exit 3")).exit_code in (143, 3)
    status = await prepared.run("true", "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    assert b"SigBlk:\t0000000000000000" in status.stdout


async def test_a_detached_commands_script_comes_first_too(persistent: Persistent) -> None:
    container_id = await persistent.detach("echo $WORD", remote_volume_mount="export WORD=word")
    assert await whole_output(persistent.machine, container_id) == b"word\n"
    pid = await persistent.background("echo $WORD", remote_volume_mount="export WORD=word")
    assert await whole_output(persistent.machine, pid) == b"word\n"


def _ids(line: str) -> tuple[str, str, frozenset[str]]:
    """What `id` prints; busybox leaves the groups out where there is only the first."""
    words = dict(word.split("=", 1) for word in line.split())
    groups = words.get("groups", words["gid"])
    return words["uid"], words["gid"], frozenset(groups.split(","))
