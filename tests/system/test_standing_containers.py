"""Containers that stay: one for each persistent overlay, joined, replaced, and cleaned up."""

import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import AgentClient, ConnectionFailed, open_client
from tests.support.crash import kill_agent
from tests.support.execution import pull, shell
from tests.support.images import Images
from tests.support.lifelines import lifeline_in
from tests.support.machine import Machine, booted
from tests.support.run_sessions import session
from tests.support.standing import (
    RUN_DIR,
    WORKSPACE,
    Persistent,
    cgroup_of_container,
    containers_of,
    end_container,
    leftovers,
    output_of,
    persistent_overlay,
    settled,
    whole_output,
)
from tests.support.watch import until

PATIENCE_S = 20
INIT = "/dev/.innkeep-init"


async def first_process(overlay: Persistent) -> str:
    """The command line of the first process of the container that a run joins or starts."""
    return (await overlay.shell("tr '\\0' ' ' </proc/1/cmdline")).strip()


async def pid_namespace(overlay: Persistent) -> str:
    return await overlay.shell("readlink /proc/self/ns/pid")


# One id: one overlay, one mount, one container


async def test_a_persistent_overlay_id_and_its_workload_id_name_one_overlay(
    persistent: Persistent,
) -> None:
    await persistent.shell("echo from the run >/note")
    info = await persistent.prepare()
    root = f"/storage/overlays/{persistent.workload}"
    assert info == {
        "rootfs_path": f"{root}/merged",
        "upper_path": f"{root}/upper",
        "work_path": f"{root}/work",
    }
    machine = persistent.machine
    assert (machine.path(info["rootfs_path"]) / "note").read_text() == "from the run\n"
    assert (machine.storage / "overlays" / persistent.workload / "upper" / "note").exists()
    mounts = await shell(persistent.client, f"grep -c ' {root}/merged ' /proc/self/mountinfo")
    assert mounts == "1\n"
    assert len(persistent.containers()) == 1


async def test_an_overlay_that_was_prepared_before_is_what_the_container_runs_on(
    persistent: Persistent,
) -> None:
    info = await persistent.prepare()
    merged = persistent.machine.path(info["rootfs_path"])
    (merged / "prepared").write_text("before\n")
    assert await persistent.shell("cat /prepared; echo after >/prepared") == "before\n"
    # The very mount: what the container writes is seen there at once.
    assert (merged / "prepared").read_text() == "after\n"


async def test_the_longest_id_is_a_workload_in_every_request(
    machine: Machine, persistent: Persistent
) -> None:
    async with persistent_overlay(machine, persistent.image, "x" * 128) as longest:
        await longest.shell("touch /here")
        info = await longest.prepare()
        assert (machine.path(info["rootfs_path"]) / "here").exists()


@pytest.mark.parametrize(
    "overlay_id", ["", ".", "..", "a/b", "../x", "a b", "a+b", "ü", "a\nb", "x" * 129]
)
async def test_an_id_that_is_none_is_an_invalid_request(
    persistent: Persistent, overlay_id: str
) -> None:
    overlays = persistent.machine.storage / "overlays"
    before = sorted(overlays.iterdir())
    for mode in ({}, {"detached": True}, {"background": True}, {"interactive": True}):
        error = await persistent.refusal("true", persistent_overlay_id=overlay_id, **mode)
        assert error.code == "INVALID_REQUEST"
        assert error.message.startswith("persistent_overlay_id: ")
    assert sorted(overlays.iterdir()) == before


async def test_what_a_run_changed_is_there_for_the_next(persistent: Persistent) -> None:
    await persistent.shell("echo kept >/root/file; rm /etc/passwd")
    assert await persistent.shell("cat /root/file; ls /etc/passwd || true") == "kept\n"


async def test_runs_with_one_id_share_one_container(persistent: Persistent) -> None:
    first = await persistent.shell("sleep 1000 & readlink /proc/self/ns/* | sort; hostname")
    second = await persistent.shell("readlink /proc/self/ns/* | sort; hostname; ps")
    assert second.startswith(first)
    assert "sleep 1000" in second
    assert len(persistent.containers()) == 1


async def test_what_a_run_left_in_the_background_lives_on_over_runs(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as line:
        later = line.script("read word </go; echo $word >/word")
        await persistent.shell(f"mkfifo /go; ({later}) &")
        await line.started()
        for _ in range(3):
            await persistent.run("true")
        await persistent.shell("echo still there >/go")
        with trio.fail_after(PATIENCE_S):
            await line.ended()
    assert await persistent.shell("cat /word") == "still there\n"


async def test_a_joining_command_has_its_own_user_environment_and_workdir(
    persistent: Persistent,
) -> None:
    env = (("FIRST", "1"), ("GREETER", "first"))
    async with persistent.lifeline() as line:
        script = line.script("exec sleep 1000")
        await persistent.detach(script, env=env, user="guest", workdir="/tmp")
        await line.started()
        assert await persistent.shell("id -un; pwd; env | sort") == (
            "root\n/\nGREETER=busybox\nHOME=/root\nPATH=/bin\nPWD=/\nSHLVL=1\nTERM=xterm-256color\n"
        )
        own = {"env": (("MINE", "2"),), "user": "guest", "workdir": "/etc"}
        assert await persistent.shell("id -un; pwd; env | sort", **own) == (
            "guest\n/etc\nGREETER=busybox\nHOME=/home/guest\nMINE=2\nPATH=/bin\nPWD=/etc\n"
            "SHLVL=1\nTERM=xterm-256color\n"
        )


async def test_a_joining_command_has_its_users_supplementary_groups(
    persistent: Persistent,
) -> None:
    await persistent.run("true")
    groups = {}
    for user in ("root", "guest", "1000", "guest:wheel", "4242:77"):
        script = "grep -E '^(Uid|Gid|Groups):' /proc/self/status"
        printed = await persistent.shell(script, user=user)
        uid, gid, more = (line.split()[1:] for line in printed.splitlines())
        groups[user] = (uid[0], gid[0], more)
    assert groups == {
        "root": ("0", "0", ["0", "10"]),
        "guest": ("1000", "1000", ["10", "1000"]),
        "1000": ("1000", "1000", ["10", "1000"]),
        "guest:wheel": ("1000", "10", ["10"]),
        "4242:77": ("4242", "77", ["77"]),
    }
    error = await persistent.refusal("id", user="nobody-here")
    assert error.code == "RUN_FAILED"
    assert "nobody-here" in error.message


async def test_first_runs_at_once_start_one_container(persistent: Persistent) -> None:
    seen: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def run_one() -> None:
            async with open_client(persistent.machine.address) as client:
                answer = await client.request(persistent.request("readlink", "/proc/self/ns/pid"))
                assert isinstance(answer, responses.Completed), answer
                seen.append(answer.stdout)

        for _ in range(20):
            nursery.start_soon(run_one)
    assert len(seen) == 20
    assert len(set(seen)) == 1
    assert len(persistent.containers()) == 1


async def test_the_first_process_is_the_agents_init_and_nothing_of_it_is_on_the_overlay(
    persistent: Persistent,
) -> None:
    assert await first_process(persistent) == f"{INIT} -P"
    upper = persistent.machine.storage / "overlays" / persistent.workload / "upper"
    files = {str(path.relative_to(upper)): path for path in upper.rglob("*") if not path.is_dir()}
    # Places for what docker has there too: the contents are bound over them.
    assert files.keys() <= {"etc/hostname", "etc/hosts", "etc/resolv.conf"}
    assert [path for path in files.values() if path.stat().st_size] == []
    # Nor can a workload change it for the machine.
    assert (await persistent.run("sh", "-c", f"echo x >{INIT}")).exit_code != 0


async def test_what_joined_commands_leave_as_zombies_is_reaped(persistent: Persistent) -> None:
    async with persistent.lifeline() as line:
        orphans = "for i in $(seq 50); do (sh -c 'exit 3' &); done"
        await persistent.shell(line.script(orphans))
        with trio.fail_after(PATIENCE_S):
            await line.ended()
    # The last ones may be on their way.
    zombies = await persistent.shell("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l")
    assert int(zombies) < 10


async def test_a_run_whose_command_fails_to_start_leaves_the_container_to_the_next(
    persistent: Persistent,
) -> None:
    namespace = await pid_namespace(persistent)
    for command in ("no-such-program", "/etc/passwd"):
        error = await persistent.refusal(command)
        assert error.code == "RUN_FAILED"
        assert command in error.message
    assert await pid_namespace(persistent) == namespace


async def test_a_workdir_that_a_running_container_lacks_is_an_error_that_names_it(
    persistent: Persistent,
) -> None:
    await persistent.run("true")
    for mode in ({}, {"background": True}, {"interactive": True}, {"tty": True}):
        for workdir, cause in (("/no/such/place", "No such file"), ("/etc/passwd", "Not a dir")):
            error = await persistent.refusal("touch", "/ran", workdir=workdir, **mode)
            assert error.code == "RUN_FAILED"
            assert workdir in error.message
            assert cause in error.message
    assert await persistent.shell("ls /ran /no 2>/dev/null || true") == ""


async def test_a_command_in_a_container_that_stays_is_isolated_as_any_other(
    persistent: Persistent,
) -> None:
    script = (
        "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/cmdline /proc/keys;"
        "ls /proc/scsi; ls /dev; ulimit -Hn; ulimit -Sn; umask; hostname;"
        "cat /etc/hosts /etc/resolv.conf /etc/hostname;"
        "for refused in 'mount -t tmpfs none /tmp' 'mkdir /sys/fs/cgroup/x' 'hostname other'"
        " 'mknod /disk b 7 0 && dd if=/disk count=1' 'umount /proc/cmdline'; do"
        ' sh -c "$refused" >/dev/null 2>&1 && echo allowed: $refused; done; true'
    )
    async with open_client(persistent.machine.address) as client:
        request = requests.Run(image=persistent.image, command=("sh", "-c", script))
        alone = await client.request(request)
    assert isinstance(alone, responses.Completed)
    joined = await persistent.run("sh", "-c", script)
    assert joined.stdout.decode() == alone.stdout.decode()
    assert b"allowed" not in joined.stdout
    assert b"CapEff:\t00000000a80425fb" in joined.stdout
    assert b"Seccomp:\t2" in joined.stdout

    namespaces = "cd /proc/self/ns; for n in pid mnt ipc uts cgroup net user; do readlink $n; done"
    inside = (await persistent.shell(namespaces)).split()
    outside = (await shell(persistent.client, namespaces)).split()
    shared = [name.partition(":")[0] for name in inside if name in outside]
    assert (len(inside), shared) == (7, ["net", "user"])


# Detached: a container of its own


async def test_a_detached_command_is_the_first_process_of_the_container_that_is_named(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as line:
        container_id = await persistent.detach(line.script("exec sleep 1000"))
        await line.started()
        # Not to be taken for a process's number.
        assert re.fullmatch("[0-9a-f]{32}", container_id)
        assert not container_id.isdecimal()
        assert persistent.containers() == [container_id]
        assert (await first_process(persistent)).endswith("sleep 1000")


async def test_a_detached_command_takes_the_place_of_a_container_that_only_waits(
    persistent: Persistent,
) -> None:
    await persistent.shell("echo kept >/note")
    (idle,) = persistent.containers()
    async with persistent.lifeline() as line:
        container_id = await persistent.detach(line.script("exec sleep 1000"))
        await line.started()
        assert persistent.containers() == [container_id]
        assert cgroup_of_container(persistent.machine, idle).pids() == []
        assert (await first_process(persistent)).endswith("sleep 1000")
        assert await persistent.shell("cat /note") == "kept\n"


async def test_a_container_in_which_something_runs_is_not_replaced(persistent: Persistent) -> None:
    async with persistent.lifeline() as left, persistent.lifeline() as line:
        await persistent.shell(left.script("sleep 1000 &"))
        (first,) = persistent.containers()
        second = await persistent.detach(line.script("exec sleep 2000"))
        await line.started()
        assert set(persistent.containers()) == {first, second}
        assert "sleep 1000" not in await persistent.shell("ps")
        await end_container(persistent.machine, second)
        assert "sleep 1000" in await persistent.shell("ps")


async def test_beside_a_workload_a_new_container_on_the_same_overlay_is_the_one_that_is_joined(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as old, persistent.lifeline() as new:
        first = await persistent.detach(old.script("echo first >/note; exec sleep 1000"))
        await old.started()
        second = await persistent.detach(new.script("exec sleep 2000"))
        await new.started()
        assert first != second
        assert (await first_process(persistent)).endswith("sleep 2000")
        assert await persistent.shell("cat /note") == "first\n"
        # The first goes on.
        assert set(persistent.containers()) == {first, second}


async def test_when_the_newest_container_has_ended_the_one_before_is_joined_and_then_a_new_one(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as old, persistent.lifeline() as new:
        await persistent.detach(old.script("mkfifo /old; read word </old"))
        await old.started()
        await persistent.detach(new.script("mkfifo /new; read word </new"))
        await new.started()
        assert "read word </new" in await first_process(persistent)
        await persistent.run("sh", "-c", "echo end >/new")
        await new.ended()
        assert "read word </old" in await first_process(persistent)
        await persistent.run("sh", "-c", "echo end >/old")
        await old.ended()
        assert await first_process(persistent) == f"{INIT} -P"


async def test_a_container_whose_first_process_has_exited_is_never_joined(
    persistent: Persistent,
) -> None:
    for _ in range(10):
        async with persistent.lifeline() as line:
            await persistent.detach(f"trap 'exit 3' TERM; {line.script('sleep 1000 & wait')}")
            await line.started()
            # Its end takes all others with it, the one included that asks for it.
            assert (await persistent.run("sh", "-c", "kill 1; exec sleep 1000")).exit_code == 137
            assert await first_process(persistent) == f"{INIT} -P"


async def test_a_detached_command_may_end_at_once(persistent: Persistent) -> None:
    machine = persistent.machine
    for _ in range(10):
        container_id = await persistent.detach("echo done")
        assert await whole_output(machine, container_id) == b"done\n"
    await settled(machine)
    files = machine.agents_open_files()
    for _ in range(20):
        await persistent.detach("exit 3")
    await settled(machine)
    assert machine.agents_open_files() <= files + 2


async def test_the_output_of_a_detached_command_is_in_a_bounded_log(
    persistent: Persistent,
) -> None:
    script = "echo begun; echo error >&2; read go </go; yes | head -c 20000000; echo end"
    await persistent.run("mkfifo", "/go")
    container_id = await persistent.detach(script)
    output = output_of(persistent.machine, container_id)
    await until(output.exists, output.parent)
    await until(lambda: output.read_bytes() == b"begun\nerror\n", output)
    await persistent.shell("echo >/go")
    kept = await whole_output(persistent.machine, container_id)
    assert kept.endswith(b"y\nend\n")
    assert 4 << 20 <= len(kept) <= 8 << 20
    assert sum(file.stat().st_size for file in output.parent.iterdir()) <= 8 << 20


async def test_a_detached_container_goes_on_when_its_host_hangs_up(persistent: Persistent) -> None:
    async with persistent.lifeline() as line:
        async with open_client(persistent.machine.address) as other:
            script = line.script("mkfifo /go; read word </go; echo $word >/word")
            request = persistent.request("sh", "-c", script, detached=True)
            assert isinstance(await other.request(request), responses.Completed)
            await line.started()
        await persistent.run("sh", "-c", "echo on and on >/go")
        with trio.fail_after(PATIENCE_S):
            await line.ended()
    # Its overlay is kept.
    assert await persistent.shell("cat /word") == "on and on\n"


async def test_a_detached_command_that_cannot_start_leaves_no_container(
    persistent: Persistent,
) -> None:
    await persistent.shell("printf '#!/no/such/shell\\n' >/script; chmod 755 /script")
    await persistent.end()
    await settled(persistent.machine)
    before = await leftovers(persistent.client)
    for command, cause in (
        ("no-such-program", "not found"),
        ("/etc/passwd", "not executable"),
        ("/script", "bad interpreter: '/no/such/shell'"),
    ):
        error = await persistent.refusal(command, detached=True)
        assert error.code == "RUN_FAILED"
        assert command in error.message
        assert cause in error.message
    await settled(persistent.machine)
    assert await leftovers(persistent.client) == before
    assert await first_process(persistent) == f"{INIT} -P"


# In the background


async def test_a_background_commands_pid_is_the_one_that_the_machine_sees(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as line:
        pid = await persistent.background(line.script("exec sleep 1000"))
        await line.started()
        seen = await shell(persistent.client, f"tr '\\0' ' ' </proc/{pid}/cmdline")
        assert seen.endswith("sleep 1000 ")
        assert "sleep 1000" in await persistent.shell("ps")
        assert await first_process(persistent) == f"{INIT} -P"
        await shell(persistent.client, f"kill {pid}")
        with trio.fail_after(PATIENCE_S):
            await line.ended()


async def test_a_background_commands_output_is_in_a_log_of_its_pid(persistent: Persistent) -> None:
    pid = await persistent.background("cat; echo error >&2; exit 3", stdin_data="input\n")
    assert await whole_output(persistent.machine, pid) == b"input\nerror\n"


async def test_a_background_command_without_input_reads_nothing(persistent: Persistent) -> None:
    pid = await persistent.background("readlink /proc/self/fd/0; cat; echo end")
    assert await whole_output(persistent.machine, pid) == b"/dev/null\nend\n"


async def test_a_background_commands_time_limit_is_for_its_whole_tree_and_nothing_else(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as limited, persistent.lifeline() as other:
        await persistent.background(other.script("exec sleep 1000"))
        await other.started()
        script = limited.script("(setsid sleep 1000 &); exec sleep 1000")
        await persistent.background(script, timeout_ms=300)
        with trio.fail_after(PATIENCE_S):
            await limited.ended()
        assert (await persistent.shell("ps")).count("sleep 1000") == 1


async def test_a_background_command_goes_on_when_its_host_hangs_up(persistent: Persistent) -> None:
    async with persistent.lifeline() as line:
        await persistent.run("mkfifo", "/go")
        async with open_client(persistent.machine.address) as other:
            script = line.script("read word </go; echo $word")
            answer = await other.request(persistent.request("sh", "-c", script, background=True))
            assert isinstance(answer, responses.Completed)
            await line.started()
        await persistent.shell("echo on and on >/go")
        assert await whole_output(persistent.machine, int(answer.stdout)) == b"on and on\n"


async def test_a_background_command_that_cannot_start_is_an_error_and_has_no_log(
    persistent: Persistent,
) -> None:
    await persistent.run("true")
    logs = await shell(persistent.client, "ls /run/innkeep/logs")
    error = await persistent.refusal("no-such-program", background=True)
    assert (error.code, "no-such-program" in error.message) == ("RUN_FAILED", True)
    assert await shell(persistent.client, "ls /run/innkeep/logs") == logs


@pytest.mark.parametrize("mode", ["detached", "background"])
async def test_what_outlives_its_request_needs_an_overlay_that_does(
    persistent: Persistent, mode: str
) -> None:
    fields = {mode: True, "persistent_overlay_id": None}
    error = await persistent.refusal("touch", "/workspace/should-not-be", **fields)
    assert error.code == "INVALID_REQUEST"
    assert "persistent_overlay_id" in error.message
    assert not (persistent.machine.storage / "workspace" / "should-not-be").exists()


@pytest.mark.parametrize("mode", ["interactive", "tty"])
@pytest.mark.parametrize("kept", [True, False], ids=["persistent", "ephemeral"])
async def test_a_session_comes_before_detached_and_background(
    persistent: Persistent, mode: str, kept: bool
) -> None:
    fields = {mode: True, "detached": True, "background": True}
    overlay_id = persistent.id if kept else None
    request = persistent.request("echo", "hello", persistent_overlay_id=overlay_id, **fields)
    async with session(persistent.machine.address, request) as talk:
        assert (await talk.exited()).exit_code == 0
    assert talk.stdout.split() == [b"hello"]


async def test_detached_comes_before_background(persistent: Persistent) -> None:
    container_id = await persistent.detach("echo hello", background=True)
    assert re.fullmatch("[0-9a-f]{32}", container_id)
    assert await whole_output(persistent.machine, container_id) == b"hello\n"


# Time limits and hang-ups


async def test_a_time_limit_ends_the_joined_commands_tree_and_nobody_elses(
    persistent: Persistent,
) -> None:
    await persistent.run("mkfifo", "/go")
    namespace = await pid_namespace(persistent)
    async with (
        persistent.lifeline() as limited,
        persistent.lifeline() as other,
        open_client(persistent.machine.address) as client,
        client.stream(
            persistent.request("sh", "-c", other.script("read word </go; exit 7"))
        ) as answers,
    ):
        await other.started()
        script = limited.script("echo so far; (setsid sleep 1000 &); sleep 1000")
        done = await persistent.run("sh", "-c", script, timeout_ms=500)
        assert (done.exit_code, done.stdout, done.timed_out) == (124, b"so far\n", True)
        with trio.fail_after(PATIENCE_S):
            await limited.ended()
        assert await pid_namespace(persistent) == namespace
        await persistent.run("sh", "-c", "echo >/go")
        answer = await answers.__anext__()
        assert isinstance(answer, responses.Completed)
        assert answer.exit_code == 7


async def test_a_time_limit_of_nothing_ends_a_joined_command_at_once(
    persistent: Persistent,
) -> None:
    namespace = await pid_namespace(persistent)
    with trio.fail_after(PATIENCE_S):
        assert (await persistent.run("sleep", "1000", timeout_ms=0)).exit_code == 124
    assert await pid_namespace(persistent) == namespace


async def test_a_hang_up_ends_the_joined_commands_tree_and_nobody_elses(
    persistent: Persistent,
) -> None:
    await persistent.run("mkfifo", "/go")
    namespace = await pid_namespace(persistent)
    async with persistent.lifeline() as gone, persistent.lifeline() as other:
        pid = await persistent.background(other.script("read word </go; echo $word"))
        await other.started()
        async with open_client(persistent.machine.address) as client:
            script = gone.script("(setsid sleep 1000 &); sleep 1000")
            await client.send(persistent.request("sh", "-c", script))
            await gone.started()
        with trio.fail_after(PATIENCE_S):
            await gone.ended()
        assert await pid_namespace(persistent) == namespace
        await persistent.shell("echo went on >/go")
        assert await whole_output(persistent.machine, pid) == b"went on\n"


async def test_a_host_that_hangs_up_while_its_container_starts_leaves_no_half_of_one(
    persistent: Persistent,
) -> None:
    for milliseconds in range(0, 60, 3):
        async with open_client(persistent.machine.address) as client:
            await client.send(persistent.request("sleep", "1000"))
            # Each time somewhere else on the way; not a wait for anything.
            await trio.sleep(milliseconds / 1000)
        assert await first_process(persistent) == f"{INIT} -P"
        assert len(persistent.containers()) == 1
        await persistent.end()
        await persistent.cleanup()


# Cleaning up


async def test_cleaning_up_takes_the_overlay_and_the_container_that_only_waits(
    persistent: Persistent,
) -> None:
    await persistent.prepare()
    before = await leftovers(persistent.client)
    await persistent.shell("echo gone >/note")
    await persistent.cleanup()
    after = await leftovers(persistent.client)
    assert persistent.workload not in after.pop("overlays")
    assert persistent.workload not in after["mounts"]
    before["mounts"] = "".join(
        line for line in before["mounts"].splitlines(True) if persistent.workload not in line
    )
    del before["overlays"]
    assert after == before
    # And again, for there is nothing to clean up any more.
    await persistent.cleanup()
    assert await persistent.shell("ls /note 2>/dev/null || echo fresh") == "fresh\n"


async def test_cleaning_up_is_refused_while_a_command_runs(persistent: Persistent) -> None:
    async with persistent.lifeline() as line:
        request = persistent.request("sh", "-c", line.script("cat"), interactive=True)
        async with session(persistent.machine.address, request) as talk:
            await line.started()
            await refused_cleanup(persistent)
            await talk.send("unharmed\n")
            await talk.see(b"unharmed\n")
            await talk.send("")
            assert (await talk.exited()).exit_code == 0
    await persistent.cleanup()


@pytest.mark.parametrize("kind", ["left behind", "in the background", "detached"])
async def test_cleaning_up_is_refused_while_something_lives_in_the_container(
    persistent: Persistent, kind: str
) -> None:
    async with persistent.lifeline() as line:
        script = line.script("exec sleep 1000")
        if kind == "left behind":
            await persistent.shell(f"({script}) &")
        elif kind == "in the background":
            await persistent.background(script)
        else:
            await persistent.detach(script)
        await line.started()
        await persistent.shell("echo kept >/note")
        await refused_cleanup(persistent)
        # It stays as it was.
        assert await persistent.shell("cat /note; ps | grep -c '[s]leep 1000'") == "kept\n1\n"
        await persistent.end()
        await persistent.cleanup()


async def refused_cleanup(overlay: Persistent) -> None:
    error = await overlay.cleanup_refusal()
    assert error.code == "CLEANUP_FAILED"
    assert overlay.workload in error.message
    assert "the container of process" in error.message
    assert (overlay.machine.storage / "overlays" / overlay.workload / "merged").is_dir()


# The image


async def test_the_overlay_keeps_its_layers_when_the_tag_moves(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    old = images.variant("standing-tag", {}, images.noise_layer("standing-old"))
    await pull(client, old.reference)
    async with persistent_overlay(machine, old.reference) as overlay:
        assert await overlay.shell("ls /noise") == "standing-old\n"
        new = images.variant("standing-tag", {"Env": ["NEW=1"]}, images.noise_layer("standing-new"))
        await pull(client, new.reference)
        # Also for a container that is started anew.
        assert await overlay.shell("ls /noise") == "standing-old\n"
        await overlay.end()
        assert await overlay.shell("ls /noise") == "standing-old\n"
        await overlay.end()
        await overlay.cleanup()
        assert await overlay.shell("ls /noise") == "standing-new\n"


async def test_an_image_that_is_not_here_is_not_found(persistent: Persistent) -> None:
    absent = "localhost:1/absent"
    for mode in ({}, {"detached": True}, {"background": True}, {"tty": True}):
        error = await persistent.refusal("true", image=absent, **mode)
        assert error.code == "NOT_FOUND"
        assert "absent" in error.message
    assert not (persistent.machine.storage / "overlays" / persistent.workload).exists()


async def test_the_images_own_command_runs_where_none_is_given(
    persistent: Persistent, client: AgentClient, images: Images
) -> None:
    assert (await persistent.run()).stdout == b"hello from busybox\n"
    silent = images.silent.reference
    await pull(client, silent)
    for mode in ({}, {"detached": True}, {"background": True}, {"interactive": True}):
        error = await persistent.refusal(image=silent, **mode)
        assert error.code == "INVALID_REQUEST"
        assert error.message == (
            f"no command given and image '{silent}' defines no entrypoint or cmd"
        )


# Nothing is left


async def test_two_hundred_joined_runs_leave_nothing(persistent: Persistent) -> None:
    machine = persistent.machine
    await persistent.run("true")
    await settled(machine, *persistent.containers())
    before = await leftovers(persistent.client)
    files = machine.agents_open_files()
    for number in range(200):
        assert (await persistent.run("sh", "-c", f"exit {number}")).exit_code == number
    assert len(persistent.containers()) == 1
    await settled(machine, *persistent.containers())
    assert await leftovers(persistent.client) == before
    assert machine.agents_open_files() <= files + 2


# The agent's death, and the machine's


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
