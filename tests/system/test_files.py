"""Files over the wire: into a machine and its containers, and out of them."""

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from initramfs.local_registry import LocalRegistry
from protocol import encode, encode_frame, requests, responses
from protocol.client import AgentClient, open_client
from protocol.constants import FILE_TRANSFER_MAX_TOTAL, FILE_WRITE_CHUNK_SIZE
from protocol.errors import ErrorCode
from tests.support.crash import kill_agent
from tests.support.execution import pull, refusal, shell
from tests.support.files import begin, download, read, read_refusal, send, sha256, upload, write
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.rounds import examples, rounds
from tests.support.standing import Persistent, persistent_overlay
from tests.support.wire import open_wire

MIB = 1024 * 1024
PATIENCE_S = 20


@pytest.fixture(scope="module")
def machine(
    registry: LocalRegistry, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """One of its own: what overlays are mounted decides where files are."""
    directory = tmp_path_factory.mktemp("files")
    with booted(directory, insecure_registries=[registry.address]) as guest:
        trio.run(pull_busybox, guest, images.busybox.reference)
        yield guest


async def pull_busybox(machine: Machine, image: str) -> None:
    async with open_client(machine.address) as client:
        await pull(client, image)


@pytest.fixture
async def overlay(machine: Machine, images: Images) -> AsyncIterator[Persistent]:
    """A persistent overlay of the busybox image, mounted."""
    async with persistent_overlay(machine, images.busybox.reference) as made:
        await made.prepare()
        yield made


@pytest.fixture
def place(machine: Machine) -> Iterator[Path]:
    """A directory of the machine, as it calls it; empty afterwards, or hidden files are left."""
    path = f"/tmp/{secrets.token_hex(4)}"
    machine.path(path).mkdir()
    yield Path(path)
    assert hidden_in(machine.path(path)) == []


def hidden_in(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob(".innkeep-*")]


async def refused(
    client: AgentClient, request: Any, code: ErrorCode = ErrorCode.FILE_IO_FAILED
) -> str:
    error = await refusal(client, request)
    assert error.code == code.value
    return error.message


# Writing and reading


async def test_a_small_file_is_written_and_read_back(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    assert await write(client, f"{place}/a/file", b"hello", mode=0o640, uid=7, gid=8) is None
    found = machine.path(f"{place}/a/file").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o640, 7, 8)
    assert await read(client, f"{place}/a/file") == b"hello"


async def test_an_upload_in_chunks_is_read_back_in_chunks_of_at_most_a_mebibyte(
    client: AgentClient, place: Path
) -> None:
    data = os.urandom(3 * MIB + 7)
    assert await upload(client, f"{place}/file", data) is None
    back = await download(client, f"{place}/file")
    assert back.data == data
    assert back.sizes == [MIB, MIB, MIB, 7]
    assert back.last == responses.DataChunk(b"", done=True)


async def test_a_path_without_a_leading_slash_is_taken_from_the_root(
    client: AgentClient, place: Path
) -> None:
    await write(client, f"{place}/file".lstrip("/"), b"hello")
    assert await read(client, f"{place}/file") == b"hello"


@pytest.mark.parametrize("path", ["", "/a\0b", "/a/../b", "..", "/"])
async def test_paths_that_mean_nothing_are_invalid_requests(client: AgentClient, path: str) -> None:
    for request in (
        requests.FileWrite(path, b""),
        requests.FileWriteBegin(path, total_size=1),
        requests.FileRead(path),
    ):
        message = await refused(client, request, ErrorCode.INVALID_REQUEST)
        assert message.startswith("path: ")


async def test_an_absent_file_is_an_error_that_says_so(client: AgentClient, place: Path) -> None:
    message = await read_refusal(client, f"{place}/nothing")
    assert message == f"read {place}/nothing: No such file or directory"


async def test_an_upload_above_the_limit_is_refused_before_anything_is_made(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    request = requests.FileWriteBegin(f"{place}/a/file", total_size=FILE_TRANSFER_MAX_TOTAL + 1)
    await refused(client, request, ErrorCode.INVALID_REQUEST)
    assert list(machine.path(str(place)).iterdir()) == []


async def test_more_bytes_than_announced_end_the_upload(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    await begin(client, f"{place}/file", 5)
    await send(client, b"1234")
    await refused(client, requests.FileWriteChunk(b"56", done=True), ErrorCode.INVALID_REQUEST)
    message = await refused(
        client, requests.FileWriteChunk(b"5", done=True), ErrorCode.INVALID_REQUEST
    )
    assert "no upload is open" in message
    assert list(machine.path(str(place)).iterdir()) == []


async def test_fewer_bytes_than_announced_leave_the_target_untouched(
    client: AgentClient, place: Path
) -> None:
    await write(client, f"{place}/file", b"old")
    await begin(client, f"{place}/file", 5)
    message = await refused(
        client, requests.FileWriteChunk(b"1234", done=True), ErrorCode.INVALID_REQUEST
    )
    assert "4 bytes came, 5 were announced" in message
    assert await read(client, f"{place}/file") == b"old"


async def test_another_request_ends_the_upload_and_is_served(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    await write(client, f"{place}/file", b"old")
    for other in (requests.Ping(), requests.FileRead(f"{place}/file"), requests.ListImages()):
        await begin(client, f"{place}/file", 5)
        await send(client, b"123")
        assert not isinstance(await client.request(other), responses.Error)
        await refused(client, requests.FileWriteChunk(b"45", True), ErrorCode.INVALID_REQUEST)
    await begin(client, f"{place}/file", 5)
    await upload(client, f"{place}/file", b"new")
    assert await read(client, f"{place}/file") == b"new"


async def test_stdin_and_resize_in_an_upload_are_dropped(client: AgentClient, place: Path) -> None:
    await begin(client, f"{place}/file", 4)
    await client.send(requests.Stdin(b"x"))
    await send(client, b"12")
    await client.send(requests.Resize(80, 24))
    await send(client, b"34", done=True)
    assert await read(client, f"{place}/file") == b"1234"


async def test_what_is_no_message_ends_the_upload(machine: Machine, place: Path) -> None:
    async with open_wire(machine.address) as wire:
        assert (await wire.ask("file_write_begin", path=f"{place}/file", total_size=1)) == {
            "status": "ok"
        }
        assert (await wire.ask("file_write_chunk", data="AA=="))["code"] == "INVALID_REQUEST"
        answer = await wire.ask("file_write_chunk", data="AA==", done=True)
        assert "no upload is open" in str(answer["message"])


async def test_a_host_may_send_chunks_without_waiting_for_their_answers(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    data = os.urandom(200_000)
    size = 1_000
    async with open_wire(machine.address) as wire, trio.open_nursery() as nursery:
        frames = [requests.FileWriteBegin(f"{place}/file", total_size=len(data))] + [
            requests.FileWriteChunk(data[at : at + size], done=at + size >= len(data))
            for at in range(0, len(data), size)
        ]
        whole = b"".join(encode_frame(encode(message)) for message in frames)
        nursery.start_soon(wire.stream.send_all, whole)
        for _ in frames:
            assert await wire.receive() == {"status": "ok"}
    assert await read(client, f"{place}/file") == data


@pytest.mark.parametrize("path", ["/", "/dev/zero", "/dev/null", "/proc", "/run/host/agent.sock"])
async def test_only_regular_files_are_read(client: AgentClient, path: str) -> None:
    code = ErrorCode.INVALID_REQUEST if path == "/" else ErrorCode.FILE_IO_FAILED
    await refused(client, requests.FileRead(path), code)
    assert isinstance(await client.request(requests.Ping()), responses.Pong)


async def test_files_of_proc_are_read_to_their_end(client: AgentClient) -> None:
    assert b"innkeep" in await read(client, "/proc/sys/kernel/hostname")
    assert (await read(client, "/proc/mounts")).endswith(b"\n")


async def test_a_slow_reader_delays_nobody_else(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    await upload(client, f"{place}/file", bytes(8 * MIB))
    async with open_client(machine.address) as slow:
        await slow.send(requests.FileRead(f"{place}/file"))
        for _ in range(5):
            assert len(await read(client, f"{place}/file")) == 8 * MIB


async def test_many_uploads_at_once_are_all_whole(machine: Machine, place: Path) -> None:
    async def one(number: int) -> None:
        async with open_client(machine.address) as own:
            await upload(own, f"{place}/dir/{number}", bytes([number]) * (MIB + number))
            assert await read(own, f"{place}/dir/{number}") == bytes([number]) * (MIB + number)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)


# Where


async def test_with_exactly_one_persistent_overlay_mounted_paths_are_its(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    await write(client, "/etc/note", b"in the overlay")
    assert not machine.path("/etc/note").exists()
    assert await overlay.shell("cat /etc/note") == "in the overlay"
    async with persistent_overlay(machine, overlay.image) as other:
        await other.prepare()
        assert "No such file" in await read_refusal(client, "/etc/note")
    assert await read(client, "/etc/note") == b"in the overlay"


async def test_an_overlay_that_is_named_is_where_paths_are(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    async with persistent_overlay(machine, overlay.image) as other:
        await other.prepare()
        for each in (overlay, other):
            data = each.id.encode()
            await write(client, "/etc/note", data, persistent_overlay_id=each.id)
            await upload(client, "/etc/more", data, persistent_overlay_id=each.id)
        for each in (overlay, other):
            assert await read(client, "/etc/note", persistent_overlay_id=each.id) == (
                each.id.encode()
            )
            assert await each.shell("cat /etc/note /etc/more") == each.id * 2


async def test_an_overlay_that_does_not_exist_or_cannot_is_refused(client: AgentClient) -> None:
    request = requests.FileRead("/etc/passwd", persistent_overlay_id="no-such")
    assert "no-such" in await refused(client, request)
    request = requests.FileRead("/etc/passwd", persistent_overlay_id="../x")
    message = await refused(client, request, ErrorCode.INVALID_REQUEST)
    assert message.startswith("persistent_overlay_id: ")


async def test_an_overlay_that_is_named_and_not_mounted_is_mounted(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    await write(client, "/note", b"kept")
    await shell(client, f"umount /storage/overlays/{overlay.workload}/merged")
    assert "No such file" in await read_refusal(client, "/note")
    assert await read(client, "/note", persistent_overlay_id=overlay.id) == b"kept"


async def test_an_overlay_is_seen_as_its_running_container_sees_it(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    await overlay.shell(
        "mkdir -p /mnt && mount -t tmpfs tmpfs /mnt && echo inside >/mnt/note", unprivileged=False
    )
    assert await read(client, "/mnt/note") == b"inside\n"
    await write(client, "/mnt/answer", b"back")
    assert await overlay.shell("cat /mnt/answer") == "back"


async def test_the_workspace_is_in_every_root(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    await write(client, "/workspace/idle", b"no container yet")
    assert (machine.storage / "workspace/idle").read_bytes() == b"no container yet"
    assert await overlay.shell("cat /workspace/idle; echo ran >/workspace/idle") == (
        "no container yet"
    )
    assert await read(client, "/workspace/idle") == b"ran\n"
    # A link in the overlay that leads there, and one there that leads into the overlay.
    await overlay.shell("ln -s /workspace /data; ln -s /etc/hostname /workspace/link")
    assert await read(client, "/data/idle") == b"ran\n"
    await overlay.end()
    assert await read(client, "/data/idle") == b"ran\n"
    (machine.storage / "workspace/idle").unlink()
    (machine.storage / "workspace/link").unlink()


async def test_the_vms_workspace_is_the_storages(machine: Machine, client: AgentClient) -> None:
    await write(client, "/workspace/vm", b"note")
    assert (machine.storage / "workspace/vm").read_bytes() == b"note"
    (machine.storage / "workspace/vm").unlink()


async def test_a_containers_links_lead_nowhere_but_inside(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    machine.path("/root/secret").write_text("the VM's")
    try:
        for target in ("/root/secret", "../../../../../../root/secret", "/proc/1/root/root/secret"):
            await overlay.shell(f"ln -sfn {target} /link; mkdir -p /dir; ln -sfn {target} /dir/up")
            for path in ("/link", "/dir/up"):
                await read_refusal(client, path)
            await write(client, "/link", b"mine")
            assert machine.path("/root/secret").read_text() == "the VM's"
    finally:
        machine.path("/root/secret").unlink()


async def test_what_is_swapped_by_a_container_meanwhile_leads_nowhere_but_inside(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    machine.path("/root/dir").mkdir()
    machine.path("/root/dir/file").write_text("the VM's")
    await overlay.background(
        "mkdir -p /real; echo mine >/real/file; cd /;"
        "while :; do ln -sfn real x; ln -sfn ../../../../../../../root/dir x;"
        "rm -rf x; mkdir x; echo mine >x/file; rm -rf x; done"
    )
    try:
        for _ in range(rounds(quick=200, soak=10_000)):
            # It fails in as many ways as the directory may be gone.
            await client.request(requests.FileWrite("/x/file", b"mine\n"))
            async with client.stream(requests.FileRead("/x/file")) as answers:
                async for part in answers:
                    if isinstance(part, responses.DataChunk):
                        assert part.data in (b"mine\n", b"")
        assert machine.path("/root/dir/file").read_text() == "the VM's"
    finally:
        machine.path("/root/dir/file").unlink()
        machine.path("/root/dir").rmdir()


async def test_an_overlay_is_not_removed_under_an_upload(
    machine: Machine, client: AgentClient, overlay: Persistent
) -> None:
    await begin(client, "/file", 2)
    async with open_client(machine.address) as other:
        message = (await overlay.over(other).cleanup_refusal()).message
        assert "is using it" in message
        await send(client, b"12", done=True)
        assert await overlay.shell("cat /file") == "12"


# Extras


async def test_they_are_announced(client: AgentClient) -> None:
    pong = await client.request(requests.Ping())
    assert isinstance(pong, responses.Pong)
    extras = {"file-range-v1", "file-digest-v1", "file-resume-v1", "file-tree-v1"}
    assert extras <= set(pong.capabilities)


async def test_a_part_of_a_file_is_read(client: AgentClient, place: Path) -> None:
    data = os.urandom(2 * MIB)
    await upload(client, f"{place}/file", data)
    assert await read(client, f"{place}/file", offset=MIB - 5) == data[MIB - 5 :]
    assert await read(client, f"{place}/file", offset=3, length=10) == data[3:13]
    assert await read(client, f"{place}/file", length=0) == b""
    assert await read(client, f"{place}/file", offset=2**64 - 1, length=2**64 - 1) == b""


async def test_digests_are_told_only_where_they_are_asked_for(
    client: AgentClient, place: Path
) -> None:
    data = os.urandom(MIB + 1)
    told = {"sha256": sha256(data), "size": len(data)}
    assert await upload(client, f"{place}/file", data, digest=True) == told
    assert await write(client, f"{place}/file", data, digest=True) == told
    last = (await download(client, f"{place}/file", digest=True)).last
    assert (last.sha256, last.size) == (sha256(data), len(data))
    part = (await download(client, f"{place}/file", digest=True, offset=1, length=9)).last
    assert (part.sha256, part.size) == (sha256(data[1:10]), 9)


async def test_another_digest_than_announced_leaves_the_target_untouched(
    client: AgentClient, place: Path
) -> None:
    await write(client, f"{place}/file", b"old")
    await begin(client, f"{place}/file", 3, sha256=sha256(b"abc"))
    assert "sha256" in await refused(client, requests.FileWriteChunk(b"abd", done=True))
    assert await read(client, f"{place}/file") == b"old"


async def test_an_upload_is_resumed_after_a_hang_up_and_after_a_crash(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    data = os.urandom(3 * MIB)
    fields: dict[str, Any] = {"resume": True, "sha256": sha256(data)}
    async with open_client(machine.address) as first:
        assert await begin(first, f"{place}/file", len(data), **fields) == {"offset": 0}
        await send(first, data[:MIB])
        # It has answered when this request has ended the upload: all of it is there.
        assert isinstance(await first.request(requests.Ping()), responses.Pong)
    async with open_client(machine.address) as second:
        assert await begin(second, f"{place}/file", len(data), **fields) == {"offset": MIB}
        await send(second, data[MIB : 2 * MIB])
        await kill_agent(machine)
    async with open_client(machine.address) as third:
        told = await begin(third, f"{place}/file", len(data), **fields)
        assert isinstance(told, dict)
        offset = told["offset"]
        assert MIB <= offset <= 2 * MIB
        await send(third, data[offset : 2 * MIB])
        await send(third, data[2 * MIB :], done=True)
        assert await read(third, f"{place}/file") == data


async def test_files_are_looked_at_listed_made_and_removed(
    client: AgentClient, place: Path
) -> None:
    async def ok(request: Any) -> Any:
        answer = await client.request(request)
        assert isinstance(answer, responses.Ok), answer
        return answer.data

    made = requests.FileMkdir(f"{place}/a/b", mode=0o700, uid=5)
    assert await ok(made) == {"created": True}
    assert await ok(made) == {"created": False}
    await write(client, f"{place}/a/b/file", b"12345", mode=0o600)
    about = await ok(requests.FileStat(f"{place}/a/b/file"))
    assert (about["kind"], about["size"], about["mode"]) == ("file", 5, 0o600)
    listing = await ok(requests.FileList(f"{place}/a/b"))
    assert listing == {"entries": [{**about, "name": "file"}], "more": False}
    assert "not empty" in await refused(client, requests.FileRemove(f"{place}/a"))
    assert await ok(requests.FileRemove(f"{place}/a", recursive=True)) is None
    for gone in (requests.FileRemove, requests.FileStat, requests.FileList):
        message = await refused(client, gone(f"{place}/a"), ErrorCode.NOT_FOUND)
        assert message.endswith(f"{place}/a: No such file or directory")
    assert await ok(requests.FileRemove(f"{place}/a", missing_ok=True)) is None
    for limit in (0, 10_001):
        request = requests.FileList(f"{place}", limit=limit)
        message = await refused(client, request, ErrorCode.INVALID_REQUEST)
        assert message == f"limit: expected 1 to 10000, got {limit}"


# Hanging up


@attrs.frozen
class Cut:
    """An upload whose host hangs up."""

    sizes: list[int]
    share: float
    resumes: bool
    exists: bool


CUTS = st.builds(
    Cut,
    sizes=st.lists(st.integers(0, 3_000) | st.just(MIB), min_size=1, max_size=4),
    share=st.floats(0, 1) | st.just(1.0),
    resumes=st.booleans(),
    exists=st.booleans(),
)


@examples(quick=100, soak=5_000)
@given(cut=CUTS)
async def test_a_hang_up_at_any_byte_leaves_the_old_file_or_the_new(
    machine: Machine, cut: Cut
) -> None:
    path = f"/tmp/{secrets.token_hex(4)}"
    directory = machine.path(path)
    directory.mkdir()
    target = directory / "file"
    old = b"old" if cut.exists else None
    if old is not None:
        target.write_bytes(old)
    pieces = [os.urandom(size) for size in cut.sizes]
    new = b"".join(pieces)
    begins = requests.FileWriteBegin(
        f"{path}/file",
        total_size=len(new),
        resume=cut.resumes,
        sha256=sha256(new) if cut.resumes else None,
    )
    last = len(pieces) - 1
    chunks = [
        requests.FileWriteChunk(piece, done=index == last) for index, piece in enumerate(pieces)
    ]
    whole = b"".join(encode_frame(encode(message)) for message in (begins, *chunks))
    sent = whole[: round(cut.share * len(whole))]
    with trio.fail_after(PATIENCE_S):
        async with await trio.open_unix_socket(machine.address.partition(":")[2]) as stream:
            await stream.send_all(sent)
            # An end of requests, not of answers: what came whole is served, and then it closes.
            if cut.share == 1.0:
                await stream.send_eof()
            else:
                stream.socket.shutdown(2)
            async for _ in stream:
                pass
    found = target.read_bytes() if target.exists() else None
    assert found in (old, new)
    if cut.share == 1.0:
        assert found == new
    left = hidden_in(directory)
    assert len(left) <= (1 if cut.resumes and found != new else 0)
    for name in left:
        kept = (directory / name).read_bytes()
        assert new.startswith(kept)
    async with open_client(machine.address) as client:
        await client.request(requests.FileRemove(path, recursive=True))
    assert not directory.exists()


async def test_nothing_is_open_after_a_hang_up(machine: Machine, place: Path) -> None:
    async with open_client(machine.address) as client:
        await client.request(requests.Ping())
        before = machine.agents_open_files()
        for _ in range(10):
            async with open_client(machine.address) as other:
                await begin(other, f"{place}/file", 10)
                await send(other, b"12345")
            async with open_client(machine.address) as other:
                await other.send(requests.FileRead("/proc/self/mountinfo"))
        with trio.fail_after(PATIENCE_S):
            while machine.agents_open_files() > before:
                await client.request(requests.Ping())


async def test_memory_stays_flat_while_files_pass(
    machine: Machine, client: AgentClient, place: Path
) -> None:
    data = os.urandom(FILE_WRITE_CHUNK_SIZE)
    await upload(client, f"{place}/file", data * 8)
    await read(client, f"{place}/file")
    before = machine.agents_memory_bytes()
    count = rounds(quick=64, soak=4096)
    await begin(client, f"{place}/file", count * len(data))
    most = 0
    for number in range(count):
        await send(client, data, done=number == count - 1)
        most = max(most, machine.agents_memory_bytes())
    async with client.stream(requests.FileRead(f"{place}/file")) as answers:
        async for _ in answers:
            most = max(most, machine.agents_memory_bytes())
    assert most - before < 8 * MIB
    machine.path(f"{place}/file").unlink()
