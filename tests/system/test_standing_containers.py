"""Containers that stay: one for each persistent overlay, joined, and cleaned up."""

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import pull, shell
from tests.support.images import Images
from tests.support.machine import Machine
from tests.support.run_sessions import session
from tests.support.standing import (
    INIT,
    Persistent,
    first_process,
    leftovers,
    persistent_overlay,
    pid_namespace,
    refused_cleanup,
    settled,
    whole_output,
)

PATIENCE_S = 20


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
    # The first container of a machine leaves something: crun keeps the seccomp profile compiled.
    await persistent.shell(":")
    await persistent.cleanup()
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
