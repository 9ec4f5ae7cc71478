"""Commands and containers on a kernel with controllers, over a real vsock, past the agent's death.

`command` asks for one in each of three places: in the VM itself, in a container of its own, and in
one that it joins. What they share is /workspace, by that name in all of them.
"""

import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve, frozen

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.protocol.sessions import pattern
from tests.support.crash import kill_agent
from tests.support.execution import execute, lifeline, pull, run, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine, booted
from tests.support.run_sessions import session
from tests.vm.conftest import empty_disk

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
PATIENCE_S = 60
WORKLOADS = "/sys/fs/cgroup/workloads"
LOGS = "/run/innkeep/logs"
ALL_CAPABILITIES = "000001ffffffffff"

SMALL_MIB = 200
SMALL_PIDS = 64

# Returns when a shell script succeeds, which is tried again whenever a directory, or a file in it,
# changes: inotify(7), with IN_MODIFY, IN_MOVED_TO, IN_CREATE and IN_DELETE.
UNTIL = """\
import ctypes, os, sys
libc = ctypes.CDLL(None)
changes = libc.inotify_init()
assert libc.inotify_add_watch(changes, os.fsencode(sys.argv[1]), 0x382) >= 0
while os.system(sys.argv[2]):
    os.read(changes, 65536)
"""
# Returns when processes have ended and somebody has reaped them: of nothing else does a pidfd say
# POLLHUP. Without numbers: all that are zombies now.
REAPED = """\
import os, select, sys
def is_zombie(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"
for pid in sys.argv[1:] or filter(str.isdigit, os.listdir("/proc")):
    try:
        if sys.argv[1:] or is_zombie(pid):
            end = select.poll()
            end.register(os.pidfd_open(int(pid)), 0)
            end.poll()
    except (FileNotFoundError, ProcessLookupError):
        pass
"""

# The processes that have what is on stdin as a word of their command line.
PIDS_OF = """\
import glob, sys
word = sys.stdin.buffer.read()
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        with open(path, "rb") as line:
            if word in line.read().split(b"\\0"):
                print(path.split("/")[2])
    except (FileNotFoundError, ProcessLookupError):
        pass
"""

# Over the loopback: 8 MiB to `cat` while they come back.
BOTH_WAYS = """\
import base64, hashlib, json, socket, struct, threading
peer = socket.socket(socket.AF_VSOCK)
peer.connect((1, 6000))
frames = peer.makefile("rb")
sent, received = hashlib.sha256(), hashlib.sha256()
def send(method, **fields):
    message = json.dumps({"method": method, **fields}).encode()
    peer.sendall(struct.pack(">I", len(message)) + message)
def feed():
    for number in range(128):
        data = b"%08d" % number * 8192
        sent.update(data)
        send("stdin", data=base64.b64encode(data).decode())
    send("stdin", data="")
def answers():
    while True:
        length, = struct.unpack(">I", frames.read(4))
        yield json.loads(frames.read(length))
send("vm_exec", command=["cat"], interactive=True)
threading.Thread(target=feed).start()
for answer in answers():
    if answer["status"] == "stdout":
        received.update(base64.b64decode(answer["data"]))
    elif answer["status"] != "started":
        break
same = sent.digest() == received.digest()
print(answer["status"], answer.get("exit_code"), end=", ")
print("all is back" if same else "something is missing")
"""


@frozen
class Commands:
    """Requests for commands in one of the three places."""

    machine: Machine
    place: str
    image: str

    @property
    def tells_signals(self) -> bool:
        """Whether the agent knows what ended a command: a container's runtime does not tell."""
        return self.place == "vm"

    def at(self, place: str) -> "Commands":
        """The same elsewhere."""
        return evolve(self, place=place)

    def __call__(self, *argv: str, **fields: Any) -> requests.VmExec | requests.Run:
        if self.place == "vm":
            return requests.VmExec(command=argv, **fields)
        if self.place == "joined":
            fields["persistent_overlay_id"] = "joined"
        return requests.Run(image=self.image, command=argv, **fields)

    def shell(self, script: str, **fields: Any) -> requests.VmExec | requests.Run:
        return self("sh", "-c", script, **fields)


@frozen
class Parrot:
    """A program that writes what it is told to its stdout, and says that it has."""

    directory: str
    script: str

    async def repeats(self, client: AgentClient, word: str) -> None:
        """Have it do so, once."""
        said = await shell(client, f"cd {self.directory}; echo {word} >told; cat said")
        assert said == f"{word}\n"


async def parrot(client: AgentClient, name: str) -> Parrot:
    directory = f"/workspace/{name}"
    await shell(client, f"mkdir {directory}; mkfifo {directory}/told {directory}/said")
    say = 'while read word <&3; do echo "heard $word"; echo "$word" >said; done'
    return Parrot(directory, f"cd {directory}; exec 3<>told; {say}")


@pytest.fixture
async def image(vm_client: AgentClient, images: Images) -> str:
    reference = images.busybox.reference_from(LOOPBACK_IN_VM)
    await pull(vm_client, reference)
    return reference


@pytest.fixture(params=["vm", "container", "joined"])
def command(request: pytest.FixtureRequest, vm: Machine, image: str) -> Commands:
    return Commands(vm, request.param, image)


@pytest.fixture(scope="module")
def small(
    vm_registry: str, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Commands]:
    """A VM with little memory for workloads, and few processes for each."""
    image = images.busybox.reference_from(LOOPBACK_IN_VM)

    async def pull_image(address: str) -> None:
        async with open_client(address) as client:
            await pull(client, image)

    words = [f"innkeep.workload_memory={SMALL_MIB}M", f"innkeep.command_pids={SMALL_PIDS}"]
    with booted(
        tmp_path_factory.mktemp("small"),
        kind="auto",
        in_memory=True,
        insecure_registries=[vm_registry],
        options=["--memory=512M", *(f"--append={word}" for word in words)],
    ) as machine:
        trio.run(pull_image, machine.address)
        yield Commands(machine, "vm", image)


@pytest.fixture(params=["vm", "container", "joined"])
def small_command(request: pytest.FixtureRequest, small: Commands) -> Commands:
    return Commands(small.machine, request.param, small.image)


@pytest.fixture
async def small_client(small: Commands) -> AsyncIterator[AgentClient]:
    async with open_client(small.machine.address) as client:
        yield client


async def finished(
    client: AgentClient, request: requests.VmExec | requests.Run
) -> responses.Completed | responses.Exited:
    """See a command to its end."""
    answer = await client.request(request)
    assert isinstance(answer, responses.Completed | responses.Exited), answer
    return answer


async def background(client: AgentClient, request: requests.VmExec | requests.Run) -> str:
    """Start what outlives its request; the name that it is known by."""
    answer = await client.request(request)
    assert isinstance(answer, responses.Completed), answer
    return answer.stdout.decode()


async def in_vm(client: AgentClient, script: str, *arguments: str) -> None:
    """Run Python in the VM."""
    with trio.fail_after(PATIENCE_S):
        done = await execute(client, "python3", "-I", "-S", "-c", script, *arguments)
    assert done.exit_code == 0, done


async def pids_of(client: AgentClient, word: str) -> list[str]:
    """The processes that have a word of their own on their command line."""
    done = await execute(client, "python3", "-I", "-S", "-c", PIDS_OF, stdin_data=word)
    assert done.exit_code == 0, done
    return done.stdout.decode().split()


class TestControllers:
    async def test_workloads_have_what_the_vm_itself_does_not_need(
        self, vm_client: AgentClient
    ) -> None:
        async def number(file: str) -> int:
            return int(await shell(vm_client, f"cat {file}"))

        total = 1024 * int(await shell(vm_client, "awk '/MemTotal/ { print $2 }' /proc/meminfo"))
        assert total * 0.7 < await number(f"{WORKLOADS}/memory.max") < total - 128 * MIB
        threads = await number("/proc/sys/kernel/threads-max")
        assert await number(f"{WORKLOADS}/pids.max") < threads / 2
        agent = "/sys/fs/cgroup/agent"
        assert await number(f"{agent}/memory.min") >= 45 * MIB
        weights = [await number(f"{where}/cpu.weight") for where in (agent, WORKLOADS)]
        assert weights[0] >= 10 * weights[1]

    async def test_each_command_in_a_container_that_stays_is_counted_by_itself(
        self, vm_client: AgentClient, image: str
    ) -> None:
        request = requests.Run(
            image=image,
            command=("sleep", "1000"),
            persistent_overlay_id="counted",
            background=True,
        )
        pid = await background(vm_client, request)
        group = await shell(vm_client, f"sed s/0::// /proc/{pid}/cgroup")
        container, _, own = group.strip().rpartition("/")
        assert container.startswith("/workloads/containers/")
        script = f"cd /sys/fs/cgroup{container}; cat pids.max {own}/pids.peak {own}/memory.peak"
        limit, processes, memory = map(int, (await shell(vm_client, script)).split())
        half = int(await shell(vm_client, f"cat {WORKLOADS}/pids.max")) // 2
        assert (limit, own != "first") == (half, True)
        assert 1 <= processes < 10
        assert 0 < memory < 100 * MIB
        await shell(vm_client, f"kill -9 {pid}")

    async def test_the_kernel_kills_commands_before_the_agent(
        self, command: Commands, vm_client: AgentClient
    ) -> None:
        agents = "/proc/$(cat /sys/fs/cgroup/agent/cgroup.procs)/oom_score_adj"
        assert await shell(vm_client, f"cat {agents}") == "-1000\n"
        adjusted = command.shell("cat /proc/1/oom_score_adj /proc/self/oom_score_adj")
        done = await finished(vm_client, adjusted)
        assert isinstance(done, responses.Completed)
        assert set(done.stdout.split()) == {b"0"}

    async def test_a_container_that_forks_too_much_is_refused_and_others_are_not(
        self, small_client: AgentClient, small: Commands
    ) -> None:
        script = f"for _ in $(seq {SMALL_PIDS}); do sleep 1000 & done; echo all"
        done = await run(small_client, small.image, "sh", "-c", script)
        assert b"fork" in done.stderr, done
        assert done.exit_code != 0
        assert (await run(small_client, small.image, "true")).exit_code == 0


class TestMemory:
    @pytest.mark.parametrize("interactive", [False, True], ids=["plain", "interactive"])
    async def test_a_command_that_is_killed_for_memory_is_told_so_and_the_others_live_on(
        self, small_client: AgentClient, small_command: Commands, interactive: bool
    ) -> None:
        name = f"beside-{small_command.place}-{interactive}"
        polly = await parrot(small_client, name)
        # In the very container, where there is one.
        beside = small_command.at("joined" if small_command.place == "joined" else "vm")
        pid = await background(small_client, beside.shell(polly.script, background=True))
        await polly.repeats(small_client, "before")
        request = small_command("tail", "/dev/zero", interactive=interactive)
        with trio.fail_after(PATIENCE_S):
            done = await finished(small_client, request)
        signal = 9 if small_command.tells_signals else None
        assert (done.exit_code, done.oom, done.signal, done.timed_out) == (137, True, signal, False)
        assert done.peak_memory_bytes is not None
        # The kernel lets a few pages pass beyond the limit.
        assert SMALL_MIB * MIB * 0.5 < done.peak_memory_bytes < SMALL_MIB * MIB * 1.1
        await polly.repeats(small_client, "after")
        await shell(small_client, f"kill -9 {pid}")

    async def test_a_command_whose_child_is_killed_for_memory_ends_as_it_likes(
        self, small_client: AgentClient, small_command: Commands
    ) -> None:
        request = small_command.shell("tail /dev/zero; echo status $?; exit 7")
        with trio.fail_after(PATIENCE_S):
            done = await finished(small_client, request)
        assert isinstance(done, responses.Completed)
        assert (done.exit_code, done.oom, done.signal) == (7, True, None)
        assert b"status 137\n" in done.stdout

    async def test_the_most_memory_that_a_command_held_is_told(
        self, small_client: AgentClient, small_command: Commands
    ) -> None:
        # A child's, which is gone by then: of the whole tree, and over all of its life.
        hold = "dd if=/dev/zero of=/dev/null bs=100M count=1; :"
        done = await finished(small_client, small_command.shell(hold))
        assert done.exit_code == 0
        assert done.peak_memory_bytes is not None
        assert 100 * MIB < done.peak_memory_bytes < 130 * MIB
        done = await finished(small_client, small_command("true"))
        assert done.peak_memory_bytes is not None
        assert done.peak_memory_bytes < 50 * MIB


async def test_the_processor_time_of_all_processes_of_a_command_is_told(
    vm_client: AgentClient, command: Commands
) -> None:
    # `times` tells the shell's own, its children's below.
    busy = "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done"
    done = await finished(vm_client, command.shell(f"({busy}); ({busy}) & {busy}; wait; times"))
    assert isinstance(done, responses.Completed)
    assert done.cpu_us is not None
    assert done.duration_ms is not None
    minutes_and_seconds = [word[:-1].split(b"m") for word in done.stdout.split()]
    told_s = sum(int(minutes) * 60 + float(seconds) for minutes, seconds in minutes_and_seconds)
    assert len(minutes_and_seconds) == 4
    # Ticks are what `times` counts in: it may be wrong by one for each of its numbers.
    assert told_s - 0.04 <= done.cpu_us / 1e6
    assert done.cpu_us > 0


async def test_a_time_limit_ends_what_a_command_started_in_sessions_of_its_own(
    vm: Machine, image: str
) -> None:
    async def be_limited(place: str) -> None:
        request = Commands(vm, place, image)
        async with lifeline(vm.address, "/workspace") as line, open_client(vm.address) as client:
            script = line.script("(setsid sleep 1000 &); sleep 1000")
            done = await finished(client, request.shell(script, timeout_ms=8000))
            assert (done.exit_code, done.timed_out) == (124, True)
            await line.ended()

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for place in ("vm", "container", "joined"):
                nursery.start_soon(be_limited, place)


async def test_a_hang_up_ends_all_that_a_plain_command_started(
    vm: Machine, command: Commands
) -> None:
    async with lifeline(vm.address, "/workspace") as line:
        async with open_client(vm.address) as client:
            await client.send(command.shell(line.script("(setsid sleep 1000 &); sleep 1000")))
            await line.started()
        with trio.fail_after(PATIENCE_S):
            await line.ended()


@pytest.mark.parametrize("tty", [False, True], ids=["pipes", "tty"])
async def test_a_hang_up_in_the_middle_of_a_session_ends_all_that_it_started(
    vm: Machine, command: Commands, tty: bool
) -> None:
    async with lifeline(vm.address, "/workspace") as line:
        script = line.script("(setsid sleep 1000 &); trap '' HUP; cat")
        request = command.shell(script, interactive=True, tty=tty)
        async with session(vm.address, request) as talk:
            await talk.send("hello\n")
            await talk.see(b"hello\r\nhello\r\n" if tty else b"hello\n")
            # vhost-device-vsock forgets to tell the VM of a close that drops unread bytes.
            await talk.send("half a line")
            await talk.see(b"half a line")
        with trio.fail_after(PATIENCE_S):
            await line.ended()


async def test_all_output_of_a_session_arrives_and_in_order(vm_client: AgentClient) -> None:
    """In frames of 64 KiB and more, which vhost-device-vsock would break in one send."""
    size = 32 * MIB
    script = (
        "import os\n"
        "block = bytes(range(256)) * 4\n"
        f"for n in range({size // 1024 // 64}):\n"
        "    data = b''.join(b'%08d' % (n * 64 + i) + block[8:] for i in range(64))\n"
        "    while data:\n"
        "        data = data[os.write(1, data):]\n"
    )
    request = requests.VmExec(
        command=("python3", "-I", "-S", "-c", script), interactive=True, timeout_ms=150_000
    )
    received = bytearray()
    async with vm_client.stream(request) as answers:
        async for answer in answers:
            if isinstance(answer, responses.Stdout):
                assert 0 < len(answer.data) <= 64 * 1024
                received += answer.data
    assert isinstance(answer, responses.Exited)
    assert answer.exit_code == 0
    assert hashlib.sha256(received).digest() == hashlib.sha256(pattern(size)).digest()


async def test_all_input_of_a_session_arrives(vm_client: AgentClient, command: Commands) -> None:
    data = pattern(8 * MIB)
    received = b""
    async with vm_client.stream(command("sha256sum", interactive=True)) as answers:
        for start in range(0, len(data), MIB):
            await vm_client.send(requests.Stdin(data[start : start + MIB]))
        await vm_client.send(requests.Stdin(b""))
        async for answer in answers:
            if isinstance(answer, responses.Stdout):
                received += answer.data
    assert isinstance(answer, responses.Exited)
    assert answer.exit_code == 0
    assert received.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_input_and_output_of_a_session_do_not_wait_for_each_other(
    vm_client: AgentClient,
) -> None:
    """From inside, by the kernel's vsock alone: with both directions full, vhost-device-vsock now
    and then stops to carry either."""
    with trio.fail_after(PATIENCE_S):
        done = await execute(vm_client, "python3", "-I", "-S", "-c", BOTH_WAYS)
    assert (done.exit_code, done.stdout) == (0, b"exited 0, all is back\n"), done


async def test_a_whole_machine_container_has_what_a_machine_has(
    vm_client: AgentClient, image: str
) -> None:
    script = """
        set -e
        grep CapEff /proc/self/status
        mkdir /sys/fs/cgroup/own
        echo $$ >/sys/fs/cgroup/own/cgroup.procs
        cat /proc/self/cgroup
        mount -t tmpfs none /mnt
        touch /mnt/file
        exec 3<>/dev/fuse
        sysctl -w net.ipv4.ip_forward=0
    """
    done = await run(vm_client, image, "sh", "-c", f"mkdir /mnt; {script}", unprivileged=False)
    assert (done.exit_code, done.stderr) == (0, b"")
    assert done.stdout.decode().split() == [
        *("CapEff:", ALL_CAPABILITIES),
        "0::/own",
        *("net.ipv4.ip_forward", "=", "0"),
    ]
    assert await shell(vm_client, f"find {WORKLOADS}/privileged -mindepth 1 -type d") == ""


@pytest.mark.parametrize(
    ("forbidden", "cause"),
    [
        ("mkdir /sys/fs/cgroup/own", "Read-only file system"),
        ("mount -t tmpfs none /tmp", "ermission denied"),
        ("mknod /tmp/fuse c 10 229 && exec 3<>/tmp/fuse", "Operation not permitted"),
        ("mknod /tmp/vda b 254 0 && exec 3</tmp/vda", "Operation not permitted"),
        ("dmesg", "Operation not permitted"),
    ],
)
async def test_any_other_container_has_not(
    vm_client: AgentClient, image: str, forbidden: str, cause: str
) -> None:
    done = await run(vm_client, image, "sh", "-c", forbidden)
    assert done.exit_code != 0
    assert cause in done.stderr.decode(), done


@pytest.mark.parametrize("interactive", [False, True], ids=["plain", "interactive"])
async def test_a_program_whose_reader_leaves_ends(
    vm_client: AgentClient, command: Commands, interactive: bool
) -> None:
    request = command.shell("yes | head -n 1; exit 3", interactive=interactive)
    with trio.fail_after(PATIENCE_S):
        done = await finished(vm_client, request)
    assert done.exit_code == 3


async def test_what_a_command_leaves_behind_lives_on_and_its_cgroup_goes_with_it(
    vm_client: AgentClient,
) -> None:
    polly = await parrot(vm_client, "left-behind")
    groups = await shell(vm_client, f"ls {WORKLOADS}/commands | wc -l")
    begun = time.monotonic()
    # Whoever wrote to a pipe without a reader would die of it.
    say = polly.script.replace("echo", "head -c 200000 /dev/zero; echo", 1)
    pid = await shell(vm_client, f"({say}) & echo $!")
    assert time.monotonic() - begun < 3
    for word in ("one", "two", "three"):
        await polly.repeats(vm_client, word)
    await shell(vm_client, f"kill -9 {pid}")
    await in_vm(vm_client, REAPED, pid.strip())
    count = f"[ $(ls {WORKLOADS}/commands | wc -l) -eq {groups.strip()} ]"
    await in_vm(vm_client, UNTIL, f"{WORKLOADS}/commands", count)


async def test_a_container_that_stays_keeps_what_a_command_left_behind_and_one_of_its_own_does_not(
    vm: Machine, vm_client: AgentClient, image: str
) -> None:
    polly = await parrot(vm_client, "left-in-container")
    script_of_joined = f"({polly.script}) >/dev/null & sleep 98701 &"
    joined = Commands(vm, "joined", image)
    assert (await finished(vm_client, joined.shell(script_of_joined))).exit_code == 0
    await polly.repeats(vm_client, "one")
    left = await pids_of(vm_client, "98701")
    assert len(left) == 1

    alone = Commands(vm, "container", image)
    script = "setsid sleep 98702 & echo up"
    assert (await finished(vm_client, alone.shell(script))).exit_code == 0
    assert await pids_of(vm_client, "98702") == []

    await polly.repeats(vm_client, "two")
    left += await pids_of(vm_client, script_of_joined)
    await shell(vm_client, f"kill -9 {' '.join(left)}")
    await in_vm(vm_client, REAPED, *left)


async def test_what_is_to_outlive_its_request_outlives_the_agent_too(
    vm: Machine, image: str
) -> None:
    def run_in(overlay: str, *argv: str, **fields: Any) -> requests.Run:
        return requests.Run(image=image, command=argv, persistent_overlay_id=overlay, **fields)

    async def namespace_of(overlay: str) -> bytes:
        done = await finished(client, run_in(overlay, "readlink", "/proc/self/ns/pid"))
        assert isinstance(done, responses.Completed)
        return done.stdout

    async with open_client(vm.address) as client:
        parrots = [await parrot(client, f"outlives-{n}") for n in range(3)]
        scripts = [("sh", "-c", each.script) for each in parrots]
        names = [
            await background(client, run_in("first", *scripts[0], detached=True)),
            await background(client, run_in("other", *scripts[1], background=True)),
            await background(client, requests.VmExec(command=scripts[2], background=True)),
        ]
        for each in parrots:
            await each.repeats(client, "before")
        before = [await namespace_of(overlay) for overlay in ("first", "other")]
    foreground: dict[str, Any] = {"command": ("sleep", "98703"), "interactive": True}
    async with (
        session(vm.address, run_in("other", "sleep", "98703", interactive=True)),
        session(vm.address, requests.Run(image=image, **foreground)),
        session(vm.address, requests.VmExec(**foreground)),
        open_client(vm.address) as client,
    ):
        lost = await pids_of(client, "98703")
        assert len(lost) == 3
        await kill_agent(vm)

    async with open_client(vm.address) as client:
        await in_vm(client, REAPED, *lost)
        assert [await namespace_of(overlay) for overlay in ("first", "other")] == before
        assert len(set(before)) == 2
        assert "ephemeral" not in await shell(client, "ls /storage/overlays")
        for each, name in zip(parrots, names, strict=True):
            await each.repeats(client, "after")
            told = f'[ "$(cat {LOGS}/{name}/output)" = "$(printf \'heard before\\nheard after\')" ]'
            await in_vm(client, UNTIL, f"{LOGS}/{name}", told)
        ends = []
        for each in parrots:
            ends += await pids_of(client, each.script)
        assert len(ends) == 3
        await shell(client, f"kill -9 {' '.join(ends)}")
        await in_vm(client, REAPED, *ends)
        for name in names:
            await in_vm(client, UNTIL, f"{LOGS}/{name}", f"[ -e {LOGS}/{name}/ended ]")
        await in_vm(client, REAPED)
        # One container ended with its workload; the other one's first process is the agent's own.
        containers = "/run/innkeep/containers"
        await in_vm(client, UNTIL, containers, f"[ ! -e {containers}/{names[0]} ]")
        assert await namespace_of("other") == before[1]


async def test_a_shutdown_does_not_wait_for_those_who_do_not_listen(
    vm_registry: str, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference_from(LOOPBACK_IN_VM)
    stubborn = ("sh", "-c", "trap '' TERM HUP INT; while :; do sleep 1000; done")
    overlay: dict[str, Any] = {"image": image, "persistent_overlay_id": "stubborn"}
    with booted(
        tmp_path, kind="auto", storage=empty_disk(tmp_path), insecure_registries=[vm_registry]
    ) as machine:
        async with open_client(machine.address) as client:
            await pull(client, image)
            await background(client, requests.Run(command=stubborn, detached=True, **overlay))
            await background(client, requests.Run(command=stubborn, background=True, **overlay))
            await background(client, requests.VmExec(command=stubborn, background=True))
            begun = time.monotonic()
            assert await client.request(requests.Shutdown()) == responses.Ok({"shutdown": True})
            assert time.monotonic() - begun < 4
        assert await trio.to_thread.run_sync(machine.wait) == 0
        assert "powering off" in machine.console_text()
