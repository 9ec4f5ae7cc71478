"""Directories in containers: the machine's own, the workspace, and mounts that cannot be made."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from protocol.values import Mount
from tests.support.crash import kill_agent
from tests.support.execution import pull, run, shell
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.run_sessions import session
from tests.support.standing import Persistent, containers_of, leftovers, settled
from tests.support.watch import until

MODES = ["ephemeral", "persistent", "joined", "detached", "background", "interactive"]


@frozen
class Shared:
    """A directory of the machine, as this machine sees it and as the machine itself does."""

    here: Path
    inside: str

    def at(self, path: str, *, read_only: bool = False) -> Mount:
        return Mount(self.inside, path, read_only)


@pytest.fixture
async def shared(machine: Machine, client: AgentClient) -> AsyncIterator[Shared]:
    """An empty directory on the machine's storage, for a test to mount."""
    inside = (await shell(client, "mktemp -d /storage/shared.XXXXXX")).strip()
    await shell(client, f"chmod 755 {inside}")
    yield Shared(machine.storage / Path(inside).name, inside)
    await shell(client, f"rm -r {inside}")


async def refused(overlay: Persistent, mode: str, *mounts: Mount) -> responses.Error:
    """The error that a command with these mounts ends in, which leaves no trace of itself."""
    fields: dict[str, Any] = {"mounts": mounts}
    if mode == "ephemeral":
        fields["persistent_overlay_id"] = None
    elif mode == "joined":
        await overlay.run("true")
    elif mode != "persistent":
        fields[mode] = True
    trace = overlay.machine.storage / "workspace" / "trace"
    try:
        error = await overlay.refusal("touch", "/workspace/trace", **fields)
        assert error.code == "MOUNT_FAILED", error
        assert not trace.exists()
    finally:
        trace.unlink(missing_ok=True)
    return error


# Made


async def test_a_tag_that_is_a_path_names_a_directory_of_the_machine(
    client: AgentClient, persistent: Persistent, shared: Shared
) -> None:
    (shared.here / "from").write_text("the machine\n")
    script = "cat /srv/data/from; echo the container >/srv/data/to"
    mounts = (shared.at("/srv/data"),)
    done = await run(client, persistent.image, "sh", "-c", script, mounts=mounts)
    assert (done.exit_code, done.stdout, done.stderr) == (0, b"the machine\n", b"")
    assert (shared.here / "to").read_text() == "the container\n"


async def test_a_container_that_stays_is_started_with_its_mounts(
    persistent: Persistent, shared: Shared
) -> None:
    (shared.here / "file").write_text("shared\n")
    mounts = (shared.at("/data"),)
    assert await persistent.shell("cat /data/file", mounts=mounts) == "shared\n"
    # They are the container's from then on, and no part of the overlay.
    assert await persistent.shell("cat /data/file") == "shared\n"
    upper = persistent.machine.storage / "overlays" / persistent.workload / "upper"
    assert list((upper / "data").iterdir()) == []


async def test_a_container_that_runs_already_gets_a_mount(
    persistent: Persistent, shared: Shared
) -> None:
    (shared.here / "file").write_text("shared\n")
    async with persistent.lifeline() as line:
        # Who is there already sees it, too.
        waiting = line.script("mkfifo /go; read word </go; cat /new/place/file")
        request = persistent.request("sh", "-c", waiting, interactive=True)
        async with session(persistent.machine.address, request) as talk:
            await line.started()
            namespace = await persistent.shell("readlink /proc/self/ns/mnt")
            mounts = (shared.at("/new/place"),)
            script = "readlink /proc/self/ns/mnt; cat /new/place/file; echo back >/new/place/back"
            assert await persistent.shell(script, mounts=mounts) == f"{namespace}shared\n"
            await persistent.shell("echo >/go")
            assert (await talk.exited()).exit_code == 0
            assert talk.stdout == b"shared\n"
    assert (shared.here / "back").read_text() == "back\n"


@pytest.mark.parametrize("mode", ["detached", "background", "interactive"])
async def test_every_way_to_run_a_command_has_its_mounts(
    persistent: Persistent, shared: Shared, mode: str
) -> None:
    (shared.here / "file").write_text("shared\n")
    fields: dict[str, Any] = {mode: True, "mounts": (shared.at("/data"),)}
    script = "cat /data/file >/data/copy; echo >/data/done"
    answer = await persistent.client.request(persistent.request("sh", "-c", script, **fields))
    assert not isinstance(answer, responses.Error), answer
    await until((shared.here / "done").exists, shared.here)
    assert (shared.here / "copy").read_text() == "shared\n"


async def test_a_mount_that_is_sent_again_is_left_alone(
    persistent: Persistent, shared: Shared
) -> None:
    mounts = (shared.at("/data"), shared.at("/look", read_only=True))
    count = "grep -cE ' /(data|look) ' /proc/self/mountinfo"
    for _ in range(3):
        assert await persistent.shell(count, mounts=mounts) == "2\n"
    assert len(persistent.containers()) == 1
    # Also one that came into a running container, and however its path is spelled.
    for path in ("/later", "/later/", "//later", "/./later/."):
        added = (*mounts, shared.at(path))
        script = "grep -cE ' /(data|look|later) ' /proc/self/mountinfo"
        assert await persistent.shell(script, mounts=added) == "3\n"


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "running"])
async def test_another_mount_at_the_same_path_is_refused_and_the_first_stays(
    persistent: Persistent, shared: Shared, client: AgentClient, fresh: bool
) -> None:
    (shared.here / "one").mkdir()
    (shared.here / "one" / "file").write_text("one\n")
    one = Shared(shared.here / "one", f"{shared.inside}/one")
    if not fresh:
        await persistent.run("true")
    mounts = (one.at("/data"),)
    assert await persistent.shell("cat /data/file", mounts=mounts) == "one\n"
    for other in (shared.at("/data"), one.at("/data", read_only=True)):
        error = await refused(persistent, "persistent", other)
        assert "/data" in error.message
        assert one.inside in error.message
    assert await persistent.shell("cat /data/file", mounts=mounts) == "one\n"


@pytest.mark.parametrize("mode", MODES)
async def test_two_mounts_of_one_request_at_the_same_path_are_refused(
    persistent: Persistent, shared: Shared, mode: str
) -> None:
    both = (shared.at("/data"), shared.at("/data", read_only=True))
    error = await refused(persistent, mode, *both)
    assert "/data" in error.message


@pytest.mark.parametrize("mode", ["ephemeral", "persistent", "joined"])
async def test_a_mount_within_another_is_there_whatever_their_order(
    persistent: Persistent, shared: Shared, mode: str
) -> None:
    for name in ("outer", "inner"):
        (shared.here / name).mkdir()
        (shared.here / name / name).write_text(f"{name}\n")
    outer, inner = (Mount(f"{shared.inside}/{name}", "", False) for name in ("outer", "inner"))
    mounts = (Mount(inner.tag, "/data/below", False), Mount(outer.tag, "/data", False))
    overlay_id = None if mode == "ephemeral" else persistent.id
    if mode == "joined":
        await persistent.run("true")
    printed = await persistent.shell(
        "cat /data/outer /data/below/inner", mounts=mounts, persistent_overlay_id=overlay_id
    )
    assert printed == "outer\ninner\n"


@pytest.mark.parametrize("mode", ["ephemeral", "persistent", "joined"])
async def test_a_read_only_mount_cannot_be_written_to_by_any_name(
    persistent: Persistent, shared: Shared, client: AgentClient, mode: str
) -> None:
    (shared.here / "file").write_text("as it was\n")
    (shared.here / "below").mkdir()
    await shell(client, f"mount -t tmpfs tmpfs {shared.inside}/below")
    try:
        overlay_id = None if mode == "ephemeral" else persistent.id
        if mode == "joined":
            await persistent.run("true")
        script = (
            "for path in /look/file /look/new /look/below/new; do"
            " (echo changed >$path) 2>/dev/null && echo wrote $path; done;"
            "rm -f /look/file 2>/dev/null; mkdir /look/directory 2>/dev/null;"
            "mount -o remount,rw /look 2>/dev/null && echo remounted; umount /look 2>/dev/null;"
            "cat /look/file"
        )
        mounts = (shared.at("/look", read_only=True),)
        printed = await persistent.shell(script, mounts=mounts, persistent_overlay_id=overlay_id)
        assert printed == "as it was\n"
        assert sorted(path.name for path in shared.here.iterdir()) == ["below", "file"]
        assert await shell(client, f"ls {shared.inside}/below") == ""
    finally:
        await persistent.end()
        await shell(client, f"umount {shared.inside}/below")


# The workspace


@pytest.mark.parametrize("mode", MODES)
async def test_every_container_has_the_workspace_read_write(
    persistent: Persistent, client: AgentClient, mode: str
) -> None:
    workspace = persistent.machine.storage / "workspace"
    (workspace / "note").write_text("from the machine\n")
    fields: dict[str, Any] = {}
    if mode == "ephemeral":
        fields["persistent_overlay_id"] = None
    elif mode == "joined":
        await persistent.run("true")
    elif mode != "persistent":
        fields[mode] = True
    script = "cat /workspace/note >/workspace/copy; echo >/workspace/done"
    answer = await client.request(persistent.request("sh", "-c", script, **fields))
    assert not isinstance(answer, responses.Error), answer
    await until((workspace / "done").exists, workspace)
    assert await shell(client, "cat /workspace/copy") == "from the machine\n"
    await shell(client, "rm /workspace/note /workspace/copy /workspace/done")


@pytest.mark.parametrize("mode", ["ephemeral", "persistent", "joined"])
async def test_a_mount_of_the_request_takes_the_place_of_the_workspace(
    persistent: Persistent, shared: Shared, mode: str
) -> None:
    (shared.here / "mine").write_text("mine\n")
    overlay_id = None if mode == "ephemeral" else persistent.id
    if mode == "joined":
        assert await persistent.shell("ls /workspace/mine 2>/dev/null || echo not yet") == (
            "not yet\n"
        )
    mounts = (shared.at("/workspace"),)
    for _ in range(2):
        printed = await persistent.shell(
            "cat /workspace/mine", mounts=mounts, persistent_overlay_id=overlay_id
        )
        assert printed == "mine\n"
    if overlay_id is not None:
        # It stays there for who says nothing of it.
        assert await persistent.shell("cat /workspace/mine") == "mine\n"
        error = await persistent.refusal("true", mounts=(shared.at("/workspace", read_only=True),))
        assert error.code == "MOUNT_FAILED"


async def test_a_mount_within_the_workspace_leaves_the_rest_of_it(
    persistent: Persistent, shared: Shared, client: AgentClient
) -> None:
    (shared.here / "mine").write_text("mine\n")
    await shell(client, "echo note >/workspace/note")
    for overlay_id in (None, persistent.id):
        printed = await persistent.shell(
            "cat /workspace/note /workspace/sub/mine",
            mounts=(shared.at("/workspace/sub"),),
            persistent_overlay_id=overlay_id,
        )
        assert printed == "note\nmine\n"
    await persistent.end()
    await shell(client, "rm /workspace/note; rmdir /workspace/sub")


# Refused


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("source", "path", "cause"),
    [
        pytest.param("/no/such/directory", "/data", "No such file", id="missing"),
        pytest.param("/etc/hostname", "/data", "Not a directory", id="a file of the machine"),
        pytest.param("/tmp", "data", "absolute path", id="relative"),
        pytest.param("/tmp", "", "absolute path", id="nowhere"),
        pytest.param("/tmp", "/", "absolute path", id="the root"),
        pytest.param("/tmp", "/data/../etc", "without ..", id="dots"),
        pytest.param("/tmp", "/..", "without ..", id="dots alone"),
        pytest.param("/tmp", "/etc/passwd", "Not a directory", id="a file of the container"),
        pytest.param("/tmp", "/etc/passwd/below", "Not a directory", id="below such a file"),
        pytest.param("no-such-share", "/data", "virtiofs", id="unknown tag"),
        pytest.param("", "/data", "absolute path", id="no tag"),
        pytest.param("a/b", "/data", "absolute path", id="a relative path as tag"),
        pytest.param("..", "/data", "absolute path", id="dots as tag"),
    ],
)
async def test_a_mount_that_cannot_be_made_is_an_error_and_nothing_is_run(
    persistent: Persistent, mode: str, source: str, path: str, cause: str
) -> None:
    error = await refused(persistent, mode, Mount(source, path, False))
    assert cause in error.message
    assert (source or repr("")) in error.message
    assert path in error.message


async def test_a_share_that_the_machine_lacks_is_refused_with_the_way_out(
    persistent: Persistent,
) -> None:
    error = await refused(persistent, "ephemeral", Mount("code", "/data", False))
    assert "'code'" in error.message
    assert "absolute path" in error.message


async def test_one_mount_that_fails_leaves_no_container_behind(
    persistent: Persistent, shared: Shared
) -> None:
    mounts = (shared.at("/data"), shared.at("/etc/passwd"))
    await persistent.prepare()
    before = await leftovers(persistent.client)
    for mode in ("persistent", "detached"):
        await refused(persistent, mode, *mounts)
    await settled(persistent.machine)
    assert await leftovers(persistent.client) == before
    assert await persistent.shell("grep -c /data /proc/self/mountinfo || true") == "0\n"


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "running"])
async def test_a_link_in_the_container_leads_a_mount_nowhere_outside(
    persistent: Persistent, client: AgentClient, shared: Shared, fresh: bool
) -> None:
    (shared.here / "file").write_text("shared\n")
    await persistent.shell(
        "mkdir -p /tmp/target; ln -s /../../tmp/target /absolute;"
        "ln -s ../../../../tmp/target /etc/relative; ln -s /../tmp/missing /dangling"
    )
    if fresh:
        await persistent.end()
    before = await shell(client, "cut -d' ' -f4- /proc/self/mountinfo | sort")
    script = "cat /absolute/file /etc/relative/file /tmp/target/file"
    assert await persistent.shell(script, mounts=(shared.at("/absolute"),)) == "shared\n" * 3
    error = await refused(persistent, "persistent", shared.at("/dangling/place"))
    assert "/dangling/place" in error.message
    assert await shell(client, "cut -d' ' -f4- /proc/self/mountinfo | sort") == before
    assert await shell(client, "ls -d /tmp/target /tmp/missing 2>/dev/null || true") == ""


async def test_mounts_are_known_to_the_next_agent(
    images: Images, registry: Any, tmp_path: Path
) -> None:
    image = images.busybox.reference
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        data, later = (machine.storage / name for name in ("data", "later"))
        for directory in (data, later):
            directory.mkdir()
            (directory / "file").write_text(f"{directory.name}\n")
        mounts = (Mount("/storage/data", "/data", False), Mount("/storage/later", "/later", True))
        script = "cat /data/file /later/file; grep -cE ' /(data|later) ' /proc/self/mountinfo"
        async with open_client(machine.address) as client:
            await pull(client, image)
            overlay = Persistent(machine, client, image, "known")
            await overlay.shell("cat /data/file", mounts=mounts[:1])
            assert await overlay.shell(script, mounts=mounts) == "data\nlater\n2\n"
            containers = containers_of(machine)
            await kill_agent(machine)
        async with open_client(machine.address) as client:
            overlay = overlay.over(client)
            assert await overlay.shell(script, mounts=mounts) == "data\nlater\n2\n"
            assert containers_of(machine) == containers
            other = Mount("/storage/data", "/later", True)
            error = await overlay.refusal("true", mounts=(other,))
            assert error.code == "MOUNT_FAILED"
            await client.request(requests.Shutdown())
