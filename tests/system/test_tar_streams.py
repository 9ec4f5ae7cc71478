"""Directories as tar streams over the wire: into the machine and into overlays, and back."""

import socket
from pathlib import Path

import pytest
import trio

from protocol import AgentRequest, encode, encode_frame, requests, responses
from protocol.client import AgentClient, open_client
from tests.support import trees
from tests.support.commands import run
from tests.support.crash import kill_agent
from tests.support.execution import pull, refusal, shell
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.process_tree import arguments, descendants, is_running
from tests.support.rounds import rounds
from tests.support.standing import Persistent
from tests.support.streams import contents, directory, entry, hard_link, stream, symlink
from tests.support.transfers import read_tar, write_tar
from tests.support.tree import Tree, describe, differences
from tests.system.test_hang_ups import Left

DONE = responses.Ok({"remarks": []})
PATIENCE_S = 30


def odd(root: Path) -> None:
    trees.odd_entries(root)
    (root / "special/null").unlink()
    (root / "special/disk").unlink()


@pytest.fixture(scope="module")
def packed() -> bytes:
    """A tree of everything odd, but for what is refused."""
    return trees.archive(odd)


@pytest.fixture
def expected(packed: bytes, tmp_path: Path) -> Tree:
    """What it is on a disk, but for the attribute that is passed over."""
    root = tmp_path / "expected"
    root.mkdir()
    options = ("--xattrs", "--xattrs-include=*", "--xattrs-exclude=trusted.*", "--numeric-owner")
    run("tar", "--extract", "--same-permissions", *options, "-C", root, stdin=packed)
    return describe(root)


@pytest.fixture
async def place(client: AgentClient) -> str:
    """A new directory in the machine, on its disk."""
    return (await shell(client, "mktemp -d /storage/tar.XXXXXX")).strip()


@pytest.mark.parametrize("chunk", [1000, 64 * 1024, 4 << 20])
async def test_a_tree_goes_in_and_comes_out_as_it_was(
    machine: Machine, client: AgentClient, place: str, packed: bytes, expected: Tree, chunk: int
) -> None:
    assert await write_tar(client, f"{place}/new/tree", packed, chunk=chunk) == DONE
    assert differences(expected, describe(machine.path(f"{place}/new/tree"))) == []
    again = await read_tar(client, f"{place}/new/tree")
    assert await write_tar(client, f"{place}/again", again) == DONE
    assert differences(expected, describe(machine.path(f"{place}/again"))) == []


async def test_chunks_may_be_sent_before_the_last_was_answered(
    machine: Machine, client: AgentClient, place: str
) -> None:
    data = stream([entry(f"{number}", bytes([number]) * 100_000) for number in range(50)])
    await client.request(requests.TarWrite(place))
    chunks = [data[start : start + 50_000] for start in range(0, len(data), 50_000)]
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for chunk in chunks:
                await client.send(requests.FileWriteChunk(chunk, done=False))
            await client.send(requests.FileWriteChunk(b"", done=True))

        nursery.start_soon(send)
        for _ in chunks:
            assert await client.receive() == responses.Ok()
        assert await client.receive() == DONE
    assert machine.path(f"{place}/49").read_bytes() == b"1" * 100_000


async def test_all_can_be_given_to_one_owner(
    machine: Machine, client: AgentClient, place: str
) -> None:
    data = stream([directory("d"), entry("d/f", b"x", uid=7, gid=8), symlink("l", "d")])
    assert await write_tar(client, f"{place}/a/b", data, uid=1000) == DONE
    for name in ("a", "a/b", "a/b/d", "a/b/d/f", "a/b/l"):
        status = machine.path(f"{place}/{name}").lstat()
        assert (status.st_uid, status.st_gid) == (1000, 0), name


async def test_nothing_gets_out_of_the_directory(
    machine: Machine, client: AgentClient, place: str
) -> None:
    await shell(client, f"mkdir {place}/in {place}/out; echo alive >{place}/out/canary")
    await shell(client, f"ln -s ../out {place}/in/disk; ln -s {place}/out {place}/in/absolute")
    before = describe(machine.path(f"{place}/out"))
    for entries in (
        [entry("../out/canary", b"dead")],
        [entry(f"{place}/out/canary", b"dead")],
        [symlink("link", "../out"), entry("link/canary", b"dead")],
        [symlink("far", f"{place}/out"), entry("far/canary", b"dead")],
        [entry("disk/canary", b"dead")],
        [entry("absolute/canary", b"dead")],
        [hard_link("hard", "../out/canary"), entry("hard", b"dead")],
        [hard_link("harder", "absolute/canary")],
    ):
        await write_tar(client, f"{place}/in", stream(entries))
        assert differences(before, describe(machine.path(f"{place}/out"))) == []
    assert b"alive" not in await read_tar(client, f"{place}/in")


async def test_a_container_that_is_not_running_is_written_to_and_read(
    persistent: Persistent, client: AgentClient
) -> None:
    prepare = requests.PrepareOverlay(persistent.image, persistent.workload)
    await client.request(prepare)
    into = {"persistent_overlay_id": persistent.id}
    data = stream([directory("srv"), entry("srv/new", b"from a stream\n")])
    assert await write_tar(client, "/", data, **into) == DONE
    assert contents(await read_tar(client, "/srv", **into)) == {
        ".": None,
        "./new": b"from a stream\n",
    }
    assert await persistent.shell("cat /srv/new") == "from a stream\n"


async def test_a_running_container_is_written_to_as_it_sees_itself(
    machine: Machine, client: AgentClient, persistent: Persistent
) -> None:
    await persistent.shell("mkdir -p /data; ln -s /data /absolute; echo mine >/data/mine")
    into = {"persistent_overlay_id": persistent.id}
    entries = [entry("absolute/new", b"through its own link"), entry("workspace/shared", b"s")]
    assert await write_tar(client, "/", stream(entries), **into) == DONE
    assert await persistent.shell("cat /data/new") == "through its own link"
    assert await persistent.shell("cat /workspace/shared") == "s"
    # What is mounted there is asked for by its own path: /proc has files without end.
    whole = contents(await read_tar(client, "/", **into))
    assert whole["./data/mine"] == b"mine\n"
    assert not [name for name in whole if name.startswith(("./proc/", "./workspace/"))]
    assert contents(await read_tar(client, "/workspace", **into))["./shared"] == b"s"
    await shell(client, "rm /storage/workspace/shared")


async def test_the_machines_own_root_is_written_to_with_what_is_mounted_in_it(
    machine: Machine, client: AgentClient, place: str
) -> None:
    inside = f"{place.removeprefix('/')}/by/root"
    entries = [entry(inside, b"on the disk"), entry("/tmp/by-root", b"on a tmpfs")]
    assert await write_tar(client, "/", stream(entries)) == DONE
    assert machine.path(f"/{inside}").read_bytes() == b"on the disk"
    assert await shell(client, "cat /tmp/by-root && rm /tmp/by-root") == "on a tmpfs"


async def test_a_file_is_read_alone_under_its_name_or_another(
    client: AgentClient, place: str
) -> None:
    await shell(client, f"cd {place}; echo one >file; echo two >other; ln -s file link")
    assert contents(await read_tar(client, f"{place}/file")) == {"file": b"one\n"}
    assert contents(await read_tar(client, f"{place}/link", name="n")) == {"n": b"one\n"}
    names = set(contents(await read_tar(client, place, name="top")))
    assert names == {"top", "top/file", "top/other", "top/link"}


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (requests.TarRead("/no/such"), "NOT_FOUND", "/no/such"),
        (requests.TarRead("/tmp/../etc"), "INVALID_REQUEST", "'..'"),
        (requests.TarRead(""), "INVALID_REQUEST", "empty"),
        (requests.TarRead("/etc", name="a\0b"), "INVALID_REQUEST", "name"),
        (requests.TarWrite("/etc/passwd/x"), "FILE_IO_FAILED", "Not a directory"),
        (requests.TarWrite("/proc/x"), "FILE_IO_FAILED", "/proc/x"),
        (requests.TarWrite("/x", uid=2**32 - 1), "INVALID_REQUEST", "uid"),
        (requests.TarWrite("/x", persistent_overlay_id="no-such"), "FILE_IO_FAILED", "no-such"),
    ],
)
async def test_what_cannot_be_done_is_told_before_anything_else(
    client: AgentClient, request_: AgentRequest, code: str, words: str
) -> None:
    error = await refusal(client, request_)
    assert error.code == code
    assert words in error.message


async def test_a_bad_stream_is_an_error_and_the_connection_goes_on(
    client: AgentClient, place: str
) -> None:
    answer = await write_tar(client, place, b"no tar at all" * 10_000)
    assert isinstance(answer, responses.Error)
    assert answer.code == "FILE_IO_FAILED"
    assert "This does not look like a tar archive" in answer.message
    assert await client.request(requests.FileWriteChunk(b"x", done=True)) != DONE
    assert await write_tar(client, place, stream([entry("good", b"x")])) == DONE


async def test_another_request_in_the_middle_ends_the_stream_and_is_served(
    machine: Machine, client: AgentClient, place: str
) -> None:
    data = stream([entry("first", b"1" * 100_000), entry("second", b"2" * 100_000)])
    await client.request(requests.TarWrite(place))
    await client.request(requests.FileWriteChunk(data[:110_000], done=False))
    pong = await client.request(requests.Ping())
    assert isinstance(pong, responses.Pong)
    assert "tar-stream-v1" in pong.capabilities
    late = await refusal(client, requests.FileWriteChunk(data[110_000:], done=True))
    assert late.code == "INVALID_REQUEST"
    assert not machine.path(f"{place}/second").exists()


async def test_nothing_runs_on_when_a_host_hangs_up(
    machine: Machine, client: AgentClient, place: str
) -> None:
    """At any byte of the conversation, either way."""
    await shell(client, f"head -c 4000000 /dev/zero >{place}/large")
    data = stream([entry("first", b"1" * 3000), directory("a"), entry("a/last", b"2" * 300_000)])
    chunks = [data[start : start + 50_000] for start in range(0, len(data), 50_000)]
    sent = [*(requests.FileWriteChunk(chunk, done=False) for chunk in chunks)]
    writing = [requests.TarWrite(place), *sent, requests.FileWriteChunk(b"", done=True)]
    reading = [requests.TarRead(place)]
    conversations = [
        [encode_frame(encode(message)) for message in messages] for messages in (writing, reading)
    ]
    before = Left.of(machine)
    count = rounds(quick=20, soak=2_000)
    for number in range(count):
        frames = conversations[number % 2]
        whole = b"".join(frames)
        part = whole[: len(whole) * (number + 1) // count]
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(machine.address.removeprefix("unix:"))
            peer.sendall(part)
            if number % 3 == 0 and len(part) >= len(frames[0]):
                # It has begun to answer.
                peer.settimeout(PATIENCE_S)
                assert peer.recv(1)
    with trio.fail_after(PATIENCE_S):
        while Left.of(machine).since(before):
            # Each answer is a turn of the agent's, and there is no other news of their end.
            await client.request(requests.Ping())


async def test_a_stream_waits_for_who_does_not_read_and_holds_nobody_up(
    machine: Machine, client: AgentClient, place: str
) -> None:
    await shell(client, f"head -c 64000000 /dev/zero >{place}/large")
    before = machine.agents_memory_bytes()
    received = 0
    async with (
        open_client(machine.address) as other,
        other.stream(requests.TarRead(place)) as answers,
    ):
        await anext(answers)
        for _ in range(50):
            await client.request(requests.Ping())
        assert machine.agents_memory_bytes() - before < 16 << 20
        async for answer in answers:
            assert isinstance(answer, responses.DataChunk)
            received += len(answer.data)
    assert received > 60_000_000


async def test_images_trees_survive_the_way_through_a_host(
    machine: Machine, client: AgentClient, images: Images, place: str
) -> None:
    """A whole system out of one overlay and into a directory, as a backup would have it."""
    await pull(client, images.busybox.reference)
    prepare = requests.PrepareOverlay(images.busybox.reference, "to-pack")
    await client.request(prepare)
    merged = "/storage/overlays/to-pack/merged"
    data = await read_tar(client, merged)
    assert await write_tar(client, f"{place}/copy", data) == DONE
    assert (
        differences(describe(machine.path(merged)), describe(machine.path(f"{place}/copy"))) == []
    )
    await client.request(requests.CleanupOverlay("to-pack"))


async def test_a_tar_does_not_outlive_its_agent(tmp_path: Path) -> None:
    with booted(tmp_path) as machine:
        async with open_client(machine.address) as client, open_client(machine.address) as other:
            await shell(client, "head -c 64000000 /dev/zero >/storage/large")
            await client.send(requests.TarRead("/storage/large"))
            assert isinstance(await client.receive(), responses.DataChunk)
            await other.request(requests.TarWrite("/storage/new"))
            tars = {pid for pid in descendants(machine.init_pid()) if b"bin/tar" in arguments(pid)}
            assert len(tars) == 2
            await kill_agent(machine)
        async with open_client(machine.address) as client:
            with trio.fail_after(PATIENCE_S):
                while any(map(is_running, tars)):
                    # As above: its successor ends them when it starts.
                    await client.request(requests.Ping())
