"""Hanging up at any byte of a session: whatever it was doing then, nothing of it is left.

An end is seen by the agent's closing its side of the connection, which it does last. Where we only
shut ours down, the kernel tells us of that; where we close it, the agent is asked until it has.
"""

import os
import select
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from initramfs.local_registry import LocalRegistry
from protocol import encode, encode_frame, requests, responses
from protocol.client import AgentClient, open_client
from tests.support.execution import pull, run, shell
from tests.support.images import Images
from tests.support.lifelines import Lifeline, lifeline_in
from tests.support.machine import Machine, booted
from tests.support.process_tree import children
from tests.support.rounds import examples

WORKLOADS = "/sys/fs/cgroup/workloads"
WORKSPACE = "/storage/workspace"
PLACES = [
    "/run/innkeep/runs",
    "/run/innkeep/containers",
    "/run/innkeep/crun",
    "/storage/overlays",
]
PATIENCE_S = 20
PING = encode_frame(encode(requests.Ping()))
STARTED = encode_frame(encode(responses.Started()))

# What a command does once it has hold of its lifeline. None leaves anything behind when it ends by
# itself, which would be right to stay; so the interrupt key ends only those that are alone.
DEAF = "trap '' INT QUIT;"
SCRIPTS = {
    "sleeps": "exec sleep 1000",
    "says what it reads": "exec cat",
    "has children": f"{DEAF} for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; wait",
    "has a child in a session of its own": f"{DEAF} setsid sleep 1000 & sleep 1000",
    "has a daemon": f"{DEAF} (setsid sh -c '(setsid sleep 1000 &) & exit' &); sleep 1000",
    "does not care": "trap '' TERM HUP INT QUIT PIPE; setsid sleep 1000 & sleep 1000",
    "forks on and on": f"{DEAF} while :; do sh -c ':' & done",
    "writes on and on": f"{DEAF} yes",
    "writes on and on to both": f"{DEAF} (setsid yes >&2 &); yes",
    "writes much": f"{DEAF} head -c 400000 /dev/zero; sleep 1000",
    "reads and sleeps": f"{DEAF} cat >/dev/null; sleep 1000",
    "ends": f"{DEAF} exit 3",
    "writes and ends": f"{DEAF} head -c 100000 /dev/zero",
}
WRITERS = ("writes on and on", "writes on and on to both")


@attrs.frozen
class HangUp:
    """What is sent and heard before the end, and how that comes."""

    fields: dict[str, bool]
    does: str
    follow_ups: list[bytes | int | tuple[int, int]]
    """Input, or so many bytes of it, or a size of the terminal."""
    cut: float
    """The share of all bytes that is sent, or less where the agent reads no more."""
    heard: int
    """Bytes of the answer, at most."""
    greets: bool
    """Whether a ping was answered before: then the agent has accepted the connection."""
    closes: bool
    """Or only shuts down, both ways, which is a hang-up to the agent too."""

    def sends(self, request: requests.VmExec | requests.Run) -> bytes:
        messages = (request, *map(follow_up, self.follow_ups))
        whole = b"".join(encode_frame(encode(message)) for message in messages)
        return whole[: round(self.cut * len(whole))]

    def hears(self, request: requests.VmExec | requests.Run) -> int:
        """How many bytes of an answer are waited for: none but those that are sure to come."""
        if len(self.sends(request)) < len(encode_frame(encode(request))):
            return 0
        if request.interactive and self.does in WRITERS:
            return self.heard
        return min(self.heard, len(STARTED)) if request.interactive or request.tty else 0


def follow_up(drawn: bytes | int | tuple[int, int]) -> requests.Stdin | requests.Resize:
    if isinstance(drawn, tuple):
        return requests.Resize(*drawn)
    return requests.Stdin(drawn if isinstance(drawn, bytes) else bytes(drawn))


HANG_UPS = st.builds(
    HangUp,
    fields=st.sampled_from([{}, {"interactive": True}, {"tty": True}]),
    does=st.sampled_from(list(SCRIPTS)),
    follow_ups=st.lists(
        st.binary(max_size=64)
        | st.sampled_from([b"", b"\x03", b"\x04", b"line\n"])
        | st.integers(1_000, 100_000)
        | st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
        max_size=4,
    ),
    cut=st.just(1.0) | st.floats(0, 1),
    heard=st.just(0) | st.integers(1, 30) | st.integers(30, 400_000),
    greets=st.booleans(),
    closes=st.booleans(),
)


@attrs.frozen
class Left:
    """What there is of commands and containers in a machine."""

    agents_files: Counter[str]
    agents_children: set[int]
    cgroups: set[str]
    mounts: set[str]
    files: set[str]

    @classmethod
    def of(cls, machine: Machine) -> "Left":
        agent = machine.agent_pid()
        mounts = Path(f"/proc/{machine.init_pid()}/mountinfo").read_text().splitlines()
        places = [machine.path(place) for place in PLACES]
        return cls(
            agents_files=Counter(files_of(agent)),
            agents_children=set(children(agent)),
            cgroups={directory for directory, _, _ in os.walk(machine.path(WORKLOADS))},
            mounts={" ".join(line.split()[4:]) for line in mounts},
            # crun keeps a cache of its own, which begins with a dot.
            files={str(path) for place in places for path in place.glob("[!.]*")},
        )

    def since(self, before: "Left") -> list[object]:
        """What was not there before."""
        news: list[object] = [*(self.agents_files - before.agents_files)]
        for name in ("agents_children", "cgroups", "mounts", "files"):
            news += [*(getattr(self, name) - getattr(before, name))]
        return news


@pytest.fixture(scope="module")
def guest(
    registry: LocalRegistry, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A machine where nothing else happens, all of whose agent is there."""
    directory = tmp_path_factory.mktemp("hang-ups")
    with booted(directory, insecure_registries=[registry.address]) as machine:
        trio.run(warm_up, machine, images.busybox.reference)
        yield machine


async def warm_up(machine: Machine, image: str) -> None:
    async with open_client(machine.address) as client:
        await pull(client, image)
        await shell(client, ":")


@examples(quick=300, soak=20_000)
@given(hang_up=HANG_UPS)
async def test_nothing_of_a_command_is_left(guest: Machine, hang_up: HangUp) -> None:
    with lifeline_in(guest) as line:
        script = line.script(SCRIPTS[hang_up.does])
        request = requests.VmExec(("sh", "-c", script), **hang_up.fields)
        await nothing_is_left(guest, hang_up, request, line)


@examples(quick=50, soak=3_000)
@given(hang_up=HANG_UPS)
async def test_nothing_of_a_container_is_left(
    guest: Machine, images: Images, hang_up: HangUp
) -> None:
    with lifeline_in(guest, WORKSPACE, "/workspace") as line:
        await nothing_is_left(guest, hang_up, in_container(images, hang_up, line), line)


@examples(quick=50, soak=3_000)
@given(hang_up=HANG_UPS)
async def test_nothing_is_left_in_a_container_that_stays(
    guest: Machine, images: Images, hang_up: HangUp
) -> None:
    async with open_client(guest.address) as client:
        await run(client, images.busybox.reference, "true", persistent_overlay_id="stays")
    before = set(guest.path("/run/innkeep/containers").iterdir())
    with lifeline_in(guest, WORKSPACE, "/workspace") as line:
        request = in_container(images, hang_up, line, persistent_overlay_id="stays")
        await nothing_is_left(guest, hang_up, request, line)
    assert set(guest.path("/run/innkeep/containers").iterdir()) == before


@examples(quick=30, soak=2_000)
@given(hang_up=HANG_UPS)
async def test_a_container_that_is_to_stay_is_left_whole_or_not_at_all(
    guest: Machine, images: Images, hang_up: HangUp
) -> None:
    with lifeline_in(guest, WORKSPACE, "/workspace") as line:
        request = in_container(images, hang_up, line, persistent_overlay_id="fresh")
        async with open_client(guest.address) as other:
            await other.request(requests.Ping())
            before = Left.of(guest)
            with trio.fail_after(PATIENCE_S):
                await carry_out(guest, hang_up, request, other)
            assert line.is_let_go()
            done = await run(other, images.busybox.reference, "pwd", persistent_overlay_id="fresh")
            assert (done.exit_code, done.stdout) == (0, b"/\n")
            cleanup = requests.CleanupOverlay(workload_id="persistent-fresh")
            assert await other.request(cleanup) == responses.Ok()
            assert await left_in_the_end(guest, before, other) == []


@pytest.mark.parametrize("fields", [{"interactive": True}, {"tty": True}], ids=str)
async def test_a_shutdown_behind_a_session_happens_though_its_sender_leaves_at_once(
    tmp_path: Path, fields: dict[str, bool]
) -> None:
    with booted(tmp_path) as machine:
        with lifeline_in(machine) as line:
            async with open_client(machine.address) as client:
                request = requests.VmExec(("sh", "-c", line.script("yes")), **fields)
                await client.send(request)
                await line.heard()
                await client.send(requests.Shutdown())
                # Closing over unread output makes it a reset for the agent, and not an end.
        assert await trio.to_thread.run_sync(machine.wait) == 0


def in_container(images: Images, hang_up: HangUp, line: Lifeline, **fields: str) -> requests.Run:
    script = line.script(SCRIPTS[hang_up.does])
    return requests.Run(images.busybox.reference, ("sh", "-c", script), **hang_up.fields, **fields)


async def nothing_is_left(
    machine: Machine,
    hang_up: HangUp,
    request: requests.VmExec | requests.Run,
    line: Lifeline,
) -> None:
    async with open_client(machine.address) as other:
        await other.request(requests.Ping())
        before, said = Left.of(machine), len(machine.console_text())
        with trio.fail_after(PATIENCE_S):
            await carry_out(machine, hang_up, request, other)
        assert await left_in_the_end(machine, before, other) == []
        assert line.is_let_go()
        # A hang-up is nothing to complain about.
        assert '"level": "error"' not in machine.console_text()[said:]


async def left_in_the_end(machine: Machine, before: "Left", other: AgentClient) -> list[object]:
    """What stays, after a few turns of the agent's: where a command ended by itself at the moment
    of the hang-up, what its pipes hold is still being dropped, and its cgroup removed."""
    with trio.move_on_after(PATIENCE_S):
        while Left.of(machine).since(before):
            await other.request(requests.Ping())
    return Left.of(machine).since(before)


async def carry_out(
    machine: Machine,
    hang_up: HangUp,
    request: requests.VmExec | requests.Run,
    other: AgentClient,
) -> None:
    """Send, hear and hang up, and wait until the agent is through with it."""
    agent = machine.agent_pid()
    known = connections_of(agent)
    with socket.socket(socket.AF_UNIX) as peer, select.epoll() as events:
        peer.connect(machine.address.removeprefix("unix:"))
        peer.setblocking(False)
        if hang_up.greets or not hang_up.closes:
            peer.send(PING)
            await hear(peer, int.from_bytes(await hear(peer, 4), "big"))
        send_what_is_taken(peer, hang_up.sends(request))
        await hear(peer, hang_up.hears(request))
        if not hang_up.closes:
            # Edge-triggered: told at each change, of which the last is the agent's close.
            events.register(peer, select.EPOLLET)
            peer.shutdown(socket.SHUT_RDWR)
            while connections_of(agent) - known:
                await trio.lowlevel.wait_readable(events.fileno())
                events.poll(0)
    # Connections are accepted in their order: when this one is known, the other is.
    async with open_client(machine.address) as later:
        await later.request(requests.Ping())
    while connections_of(agent) - known:
        # Each answer is a turn of the agent's, and there is no other news of a connection's end.
        await other.request(requests.Ping())


async def hear(peer: socket.socket, count: int) -> bytes:
    heard = b""
    while len(heard) < count:
        await trio.lowlevel.wait_readable(peer)
        data = peer.recv(count - len(heard))
        assert data, "the agent has hung up"
        heard += data
    return heard


def send_what_is_taken(peer: socket.socket, data: bytes) -> None:
    """Send until the socket's buffer is full: not all commands read."""
    left = memoryview(data)
    while left:
        try:
            left = left[peer.send(left) :]
        except BlockingIOError:
            return


def files_of(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


def connections_of(pid: int) -> set[str]:
    return {file for file in files_of(pid) if file.startswith("socket:")}
