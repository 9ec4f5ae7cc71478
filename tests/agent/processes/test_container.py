"""Commands in containers: real ones, by crun on a busybox tree."""

import errno
import os
import platform
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import trio

from agent.errors import AgentError
from agent.processes.cgroup import Cgroup
from agent.processes.collect import OUTPUT_LIMIT_BYTES, Collected
from agent.processes.command import Bind, ContainerCommand
from agent.processes.container import ContainerRuntime
from agent.processes.outcome import Outcome
from agent.processes.service import Processes, open_processes
from protocol.errors import ErrorCode
from protocol.values import ImageInfo
from tests.support import tiny_programs
from tests.support.image_info import image_info
from tests.support.lifelines import Lifeline, lifeline
from tests.support.process_tree import children, innermost_pid

PATIENCE_S = 30

IMAGE = image_info(env=("PATH=/bin", "COLOUR=red", "SHAPE=round"))


@attrs.frozen
class Containers:
    """Runs commands of one image on one tree."""

    runtime: ContainerRuntime
    rootfs: Path
    image: ImageInfo = IMAGE

    async def run(
        self,
        *argv: str,
        env: Sequence[tuple[str, str]] = (),
        workdir: str | None = None,
        user: str | None = None,
        binds: Sequence[Bind] = (),
        stdin_data: str | None = None,
        timeout_s: float | None = None,
    ) -> Collected:
        command = ContainerCommand.from_request(
            "test", self.image, argv, env, workdir=workdir, user=user, binds=binds
        )
        with trio.fail_after(PATIENCE_S):
            async with self.runtime.running(
                command, self.rootfs, takes_stdin=stdin_data is not None
            ) as running:
                return await running.collect(stdin_data=stdin_data, timeout_s=timeout_s)

    async def printed(self, *argv: str, user: str | None = None, workdir: str | None = None) -> str:
        """What a command prints, which must succeed."""
        collected = await self.run(*argv, user=user, workdir=workdir)
        assert (collected.exit_code, collected.stderr) == (0, b""), collected
        return collected.stdout.decode()

    async def refusal(self, *argv: str, user: str | None = None, workdir: str | None = None) -> str:
        """The message of the RUN_FAILED that a command must end in."""
        with pytest.raises(AgentError) as raised:
            await self.run(*argv, user=user, workdir=workdir)
        assert raised.value.code is ErrorCode.RUN_FAILED
        return raised.value.message


@pytest.fixture
def containers(runtime: ContainerRuntime, rootfs: Path) -> Containers:
    return Containers(runtime, rootfs)


async def test_the_commands_output_and_exit_code_are_its_own(containers: Containers) -> None:
    collected = await containers.run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert collected == Collected(Outcome(exit_code=7), b"out\n", b"err\n")
    # 1 is also what crun exits with when it fails.
    assert await containers.run("false") == Collected(Outcome(exit_code=1), b"", b"")


async def test_without_a_command_it_is_the_images_entrypoint_and_cmd(
    containers: Containers,
) -> None:
    image = attrs.evolve(IMAGE, entrypoint=("echo", "entry"), cmd=("point", "default"))
    containers = attrs.evolve(containers, image=image)
    assert await containers.printed() == "entry point default\n"
    assert await containers.printed("echo", "mine") == "mine\n"


async def test_the_environment_is_the_users_the_images_and_the_requests(
    containers: Containers,
) -> None:
    env = (("SHAPE", "square"), ("EMPTY", ""), ("odd.name", "ü=1"))
    collected = await containers.run("cat", "/proc/self/environ", env=env, user="alice")
    assert sorted(collected.stdout.decode().removesuffix("\0").split("\0")) == [
        "COLOUR=red",
        "EMPTY=",
        "HOME=/home/alice",
        "PATH=/bin",
        "SHAPE=square",
        "TERM=xterm-256color",
        "odd.name=ü=1",
    ]


async def test_the_user_is_the_images_unless_given(containers: Containers) -> None:
    assert await containers.printed("id") == "uid=0(root) gid=0(root) groups=0(root),10(wheel)\n"
    alice = "uid=1000(alice) gid=1001(alice) groups=10(wheel),29(audio),1001(alice)\n"
    assert await containers.printed("id", user="alice") == alice
    assert await containers.printed("id", user="1000") == alice
    of_image = attrs.evolve(containers, image=attrs.evolve(IMAGE, user="alice"))
    assert await of_image.printed("id") == alice
    assert await of_image.printed("id", user="7:wheel") == "uid=7 gid=10(wheel) groups=10(wheel)\n"
    assert "user 'bob' is not in the image's /etc/passwd" in await containers.refusal(
        "id", user="bob"
    )


async def test_the_workdir_is_made_where_it_is_missing(containers: Containers) -> None:
    assert await containers.printed("pwd") == "/\n"
    assert await containers.printed("pwd", workdir="/made/here") == "/made/here\n"
    of_image = attrs.evolve(containers, image=attrs.evolve(IMAGE, workdir="/etc"))
    assert await of_image.printed("pwd") == "/etc\n"
    assert "Not a directory" in await containers.refusal("pwd", workdir="/etc/passwd")


async def test_a_program_that_cannot_start_is_an_error_with_the_cause(
    containers: Containers,
) -> None:
    script = containers.rootfs / "bin" / "script"
    script.write_text("#!/no/such/shell\n")
    assert "not found" in await containers.refusal("no-such-program")
    assert "not found" in await containers.refusal("/no/such/program")
    assert "ermi" in await containers.refusal("/bin/script")  # crun's words differ by version
    script.chmod(0o755)
    assert "bad interpreter: '/no/such/shell'" in await containers.refusal("script")
    script.write_text("echo no first line\n")
    assert "exec format error" in await containers.refusal("script")


async def test_a_command_that_only_looks_like_a_failed_start_is_none(
    containers: Containers,
) -> None:
    script = "echo started; echo 'exec container process `/bin/x`: Exec format error' >&2; exit 1"
    assert (await containers.run("sh", "-c", script)).exit_code == 1


async def test_output_is_collected_while_it_runs_and_truncated_at_the_limit(
    containers: Containers,
) -> None:
    collected = await containers.run("sh", "-c", "seq 1 200000; seq 1 100000 >&2")
    assert collected.stdout.decode().split() == [str(number) for number in range(1, 200001)]
    assert collected.stderr.decode().split() == [str(number) for number in range(1, 100001)]
    collected = await containers.run("sh", "-c", "yes | head -c 12000000; exit 3")
    assert collected.exit_code == 3
    assert len(collected.stdout) == OUTPUT_LIMIT_BYTES
    assert collected.stdout_truncated


async def test_stdin_is_empty_unless_given(containers: Containers) -> None:
    assert (await containers.run("cat")).stdout == b""
    assert (await containers.run("cat", stdin_data="x" * 3_000_000)).stdout == b"x" * 3_000_000


async def test_a_time_limit_ends_the_whole_container(
    containers: Containers, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        collected = await held(containers, line, timeout_s=1)
        assert collected.exit_code == 124
        await line.heard()
        assert not line.is_held()
    assert (await containers.run("sleep", "1000", timeout_s=0)).exit_code == 124


async def test_a_cancelled_command_leaves_nothing(
    containers: Containers, cgroup_root: Path, tmp_path: Path
) -> None:
    await containers.run("true")
    before = resources()
    with lifeline(tmp_path) as line:
        async with trio.open_nursery() as connection:
            connection.start_soon(held, containers, line)
            await line.heard()
            connection.cancel_scope.cancel()
        assert not line.is_held()
    assert resources() == before
    assert_nothing_is_left(cgroup_root, tmp_path)


async def test_a_cancellation_while_crun_works_leaves_nothing(
    containers: Containers, cgroup_root: Path, tmp_path: Path
) -> None:
    await containers.run("true")
    before = resources()
    for milliseconds in range(0, 40, 2):
        with trio.move_on_after(milliseconds / 1000):
            await containers.run("sleep", "1000")
    assert resources() == before
    assert_nothing_is_left(cgroup_root, tmp_path)


async def test_the_container_ends_with_its_command(
    containers: Containers, cgroup_root: Path, tmp_path: Path
) -> None:
    with lifeline(tmp_path) as line:
        collected = await held(containers, line, then="echo done")
        assert collected.stdout == b"done\n"
        await line.heard()
        assert not line.is_held()
    assert_nothing_is_left(cgroup_root, tmp_path)


async def test_a_container_does_not_outlive_a_crun_that_was_killed(
    containers: Containers, processes: Processes, cgroup_root: Path, tmp_path: Path
) -> None:
    assert processes.tree is not None
    ended: list[Collected] = []

    async def run_held(line: Lifeline) -> None:
        ended.append(await held(containers, line))

    with lifeline(tmp_path) as line:
        async with trio.open_nursery() as connection:
            connection.start_soon(run_held, line)
            await line.heard()
            (cgroup,) = Cgroup.all_in(processes.tree.containers)
            members = map(int, (cgroup.path / "cgroup.procs").read_text().split())
            (crun,) = (pid for pid in members if innermost_pid(pid) == pid)
            os.kill(crun, signal.SIGKILL)
        assert not line.is_held()
    assert [collected.exit_code for collected in ended] == [128 + signal.SIGKILL]
    assert_nothing_is_left(cgroup_root, tmp_path)


async def test_containers_at_the_same_time_do_not_meet(
    runtime: ContainerRuntime, containers: Containers, cgroup_root: Path, tmp_path: Path
) -> None:
    codes: list[int] = []

    async def run_one(number: int) -> None:
        collected = await containers.run("sh", "-c", f"ps | head -n 3; exit {number}")
        assert b"ps" in collected.stdout
        codes.append(collected.exit_code)

    async with trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(run_one, number)
    assert sorted(codes) == list(range(12))
    assert_nothing_is_left(cgroup_root, tmp_path)


async def test_it_is_isolated_as_docker_does_it(containers: Containers) -> None:
    outside = namespaces()
    inside = dict(
        line.split(" ")
        for line in (
            await containers.printed(
                "sh", "-c", 'for n in "$@"; do echo $n $(readlink /proc/self/ns/$n); done',
                "sh", *NAMESPACES,
            )
        ).splitlines()
    )  # fmt: skip
    assert {name for name in NAMESPACES if inside[name] != outside[name]} == {
        "pid",
        "mnt",
        "ipc",
        "uts",
        "cgroup",
    }
    status = dict(
        line.split(":\t", 1)
        for line in (await containers.printed("cat", "/proc/self/status")).splitlines()
    )
    assert status["CapEff"] == status["CapBnd"] == "00000000a80425fb"
    assert status["CapAmb"] == status["CapInh"] == "0" * 16
    assert status["SigIgn"] == status["SigBlk"] == "0" * 16
    assert status["NoNewPrivs"] == "0"
    assert status["Seccomp"] == "2"
    assert status["Pid"] == "1"
    assert status["Umask"] == "0022"
    of_alice = await containers.printed("cat", "/proc/self/status", user="alice")
    assert "CapEff:\t0000000000000000" in of_alice


NAMESPACES = ("pid", "mnt", "ipc", "uts", "cgroup", "net", "user")


async def test_the_machines_secrets_and_switches_are_masked(containers: Containers) -> None:
    assert await containers.printed("cat", "/proc/cmdline", "/proc/keys", "/proc/timer_list") == ""
    for script in (
        "echo 1 >/proc/sys/kernel/printk",
        "echo h >/proc/sysrq-trigger",
        "echo 1 >/sys/kernel/uevent_seqnum",
        "mkdir /sys/fs/cgroup/x",
        "mount -t tmpfs none /tmp",
        "umount /proc/cmdline",
        "cat /dev/kmsg",
    ):
        assert (await containers.run("sh", "-c", script)).exit_code != 0, script


async def test_its_dev_is_dockers(containers: Containers) -> None:
    names = (await containers.printed("ls", "/dev")).split()
    assert " ".join(names) == (
        "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    )
    mounts = await containers.printed("cat", "/proc/mounts")
    assert "shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k" in mounts
    made = await containers.printed("sh", "-c", "mknod /tmp/disk b 42 0; stat -c %t /tmp/disk")
    assert made == "2a\n"
    assert stat.S_ISBLK((containers.rootfs / "tmp" / "disk").stat().st_mode)
    (containers.rootfs / "tmp" / "disk").unlink()


async def test_it_has_the_machines_network_and_names(containers: Containers) -> None:
    machine = os.uname().nodename
    assert await containers.printed("hostname") == f"{machine}\n"
    assert await containers.printed("cat", "/etc/hostname") == f"{machine}\n"
    hosts = await containers.printed("cat", "/etc/hosts")
    assert {"localhost", machine} <= set(hosts.split())
    resolvers = await containers.printed("cat", "/etc/resolv.conf")
    assert resolvers == text_of("/etc/resolv.conf")
    await containers.run("sh", "-c", "echo 192.0.2.1 mine >>/etc/hosts")
    assert "mine" not in text_of("/etc/hosts")
    assert "mine" not in await containers.printed("cat", "/etc/hosts")


async def test_network_files_that_are_symlinks_in_the_image_stay_in_it(
    containers: Containers,
) -> None:
    (containers.rootfs / "etc" / "resolv.conf").symlink_to("../../../run/resolve/stub.conf")
    resolvers = await containers.printed("cat", "/etc/resolv.conf")
    assert resolvers == text_of("/etc/resolv.conf")
    assert (containers.rootfs / "run" / "resolve" / "stub.conf").exists()


async def test_the_passwd_of_a_hostile_image_cannot_name_a_file_of_the_machine(
    containers: Containers, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("eve:x:0:0::/stolen:/bin/sh\n")
    (containers.rootfs / "etc" / "passwd").unlink()
    (containers.rootfs / "etc" / "passwd").symlink_to(outside)
    assert "user 'eve'" in await containers.refusal("id", user="eve")
    (containers.rootfs / "etc" / "passwd").unlink()
    os.mkfifo(containers.rootfs / "etc" / "passwd")
    assert "user 'eve'" in await containers.refusal("id", user="eve")


async def test_directories_of_the_machine_can_be_bound_in(
    containers: Containers, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    binds = (Bind(str(shared), "/work"), Bind(str(shared), "/look", read_only=True))
    script = "echo hello >/work/file; cat /look/file; echo no >/look/file"
    collected = await containers.run("sh", "-c", script, binds=binds)
    assert collected.exit_code != 0
    assert collected.stdout == b"hello\n"
    assert (shared / "file").read_text() == "hello\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the programs are x86-64's")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        pytest.param(tiny_programs.socket_program(2), 0, id="AF_INET"),
        pytest.param(tiny_programs.socket_program(10), 0, id="AF_INET6"),
        pytest.param(tiny_programs.socket_program(1), 0, id="AF_UNIX"),
        pytest.param(tiny_programs.socket_program(40), errno.ENOSYS, id="AF_VSOCK"),
        pytest.param(tiny_programs.socket_program(2**32 + 40), errno.ENOSYS, id="AF_VSOCK, bit 32"),
        pytest.param(tiny_programs.socket_program_of_32_bits(2), 0, id="32-bit AF_INET"),
        pytest.param(
            tiny_programs.socket_program_of_32_bits(40), errno.ENOSYS, id="32-bit AF_VSOCK"
        ),
        pytest.param(
            tiny_programs.socketcall_program_of_32_bits(40), errno.EAFNOSUPPORT, id="socketcall"
        ),
        pytest.param(tiny_programs.io_uring_program(), errno.ENOSYS, id="io_uring"),
    ],
)
async def test_no_way_leads_to_the_hosts_sockets(
    containers: Containers, program: bytes, expected: int
) -> None:
    path = containers.rootfs / "bin" / "program"
    path.write_bytes(program)
    path.chmod(0o755)
    assert (await containers.run("program")).exit_code == expected


async def test_without_cgroups_there_are_no_containers(rootfs: Path, tmp_path: Path) -> None:
    async with open_processes(None, tmp_path / "logs") as processes:
        containers = Containers(ContainerRuntime.open(processes, tmp_path / "run"), rootfs)
        assert "cgroup2" in await containers.refusal("true")


async def test_without_crun_or_a_seccomp_profile_the_cause_is_told(
    processes: Processes, rootfs: Path, tmp_path: Path
) -> None:
    runtime = ContainerRuntime.open(processes, tmp_path / "run", crun="no-such-crun")
    assert "no-such-crun: not found" in await Containers(runtime, rootfs).refusal("true")
    missing = tmp_path / "seccomp.json"
    runtime = ContainerRuntime.open(processes, tmp_path / "run", seccomp_profile=missing)
    assert str(missing) in await Containers(runtime, rootfs).refusal("true")


async def test_what_an_earlier_agent_left_is_removed(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "run" / "runs" / "old").mkdir(parents=True)
    (tmp_path / "run" / "crun" / "old").mkdir(parents=True)
    ContainerRuntime.open(processes, tmp_path / "run")
    assert left_in(tmp_path / "run") == []


async def held(
    containers: Containers, line: Lifeline, then: str = "sleep 1000", timeout_s: float | None = None
) -> Collected:
    """Run a shell that leaves processes behind; all of them hold the lifeline."""
    script = f"exec 9>/lifeline/{line.path.name}; setsid sleep 1000 & printf . >&9; {then}"
    bind = Bind(str(line.path.parent), "/lifeline")
    return await containers.run("sh", "-c", script, binds=(bind,), timeout_s=timeout_s)


def resources() -> tuple[int, list[int]]:
    """The number of this process's descriptors, and its children, zombies included."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir()), children(os.getpid())


def namespaces() -> dict[str, str]:
    """Those of this process, as links in /proc name them."""
    return {name: str(Path("/proc/self/ns", name).readlink()) for name in NAMESPACES}


def text_of(path: str) -> str:
    return Path(path).read_text()


def left_in(run_dir: Path) -> list[Path]:
    """Bundles and containers' state; crun also keeps a cache there."""
    return [path for path in run_dir.glob("*/*") if not path.name.startswith(".")]


def assert_nothing_is_left(cgroup_root: Path, tmp_path: Path) -> None:
    cgroups = (cgroup_root / "workloads" / "containers").iterdir()
    assert [path for path in cgroups if path.is_dir()] == []
    assert left_in(tmp_path / "run") == []
